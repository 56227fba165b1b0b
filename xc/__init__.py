"""Hybrid-parallel training of classifiers over very many classes."""
