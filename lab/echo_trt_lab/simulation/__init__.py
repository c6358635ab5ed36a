"""Replays recorded draft trees under any policy, on any machine whose passes can be timed."""
