"""Does selection help? Arms trained from one recipe, their held-out losses, and what the differences are worth."""
