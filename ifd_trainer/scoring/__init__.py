"""The only room that runs a model forward: the transform, the engines, long scoring jobs."""
