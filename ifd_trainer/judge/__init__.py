"""Which of two answers is better: a judge behind a server or a reward model, what it says, and what that adds up to."""
