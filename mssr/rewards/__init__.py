"""Rewards: answer extraction, the symbolic check in a killable process, the format reward."""
