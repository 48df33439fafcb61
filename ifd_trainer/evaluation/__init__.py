"""What a trained model is worth: losses of held-out rows, answers, tasks, and what a difference of them is worth."""
