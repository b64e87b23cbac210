"""Evaluators: functions that take a run and return figures."""
