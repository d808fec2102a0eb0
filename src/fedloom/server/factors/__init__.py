"""How low-rank factors of many clients become one pair."""
