"""A selected set leaves the house: selection of a file, cards, hubs, scores of other programs."""
