"""The only room that knows Trainer: its hooks, the pool, packing, history, the callback, recipes."""
