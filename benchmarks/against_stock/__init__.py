"""Parts of `benchmarks/multi_adapter.py`: checkpoints made on the spot, both servers, traffic, figures, scenarios."""
