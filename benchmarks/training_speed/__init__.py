"""Parts of benchmarks/train.py: what is trained on, one leg in a process of its own, and what its figures mean."""
