"""Any model we only talk to (teacher, opponent, judge) and the ledger of all that was said to it."""
