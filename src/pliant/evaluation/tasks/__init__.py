"""Benchmark tasks through lm-eval, and perplexity, for a model beside its base."""
