"""Adapters that put the low-bit cache under other libraries' models."""
