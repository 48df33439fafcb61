"""The equations, policies, schedules and reasons: pure, NumPy alone, no model."""
