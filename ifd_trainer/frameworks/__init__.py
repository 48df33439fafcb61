"""The callback in training frameworks that make their trainers themselves: a thin module for each."""
