"""The gateway, the engines behind it, and what runs inside vLLM."""
