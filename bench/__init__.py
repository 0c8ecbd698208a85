"""Benchmarks: `python -m bench` lists them. Nothing in rootfree_fused imports this package."""
