"""Clients for models that purld only queries (teacher, opponent, judge), and the ledger of all requests to them.

with Ledger(run.ledger) as ledger:                              # purld.clients.ledger
    client = open_client(config.teacher, ledger, "teacher")     # purld.clients.open
    collected = collect_anchors(prompts, client)                # purld.clients.anchors
"""
