"""Parts of `gateway_overhead.py`: the mock engine, the client, and the gateways it compares."""
