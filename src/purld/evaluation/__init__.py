"""Evaluate models on held-out prompts: answers, verdicts of a judge, rates with intervals.

`answers` draws a model's answers and `recorded` reads them back from a run; `judge` and `verdicts` compare them with an
opponent's; `accuracy`, `winrate` and `score_quality` turn them into rates; `summary` makes the rows of results.json.

    from purld.evaluation.accuracy import accuracy_with_interval
    from purld.evaluation.winrate import summarize

    share, (low, high) = accuracy_with_interval([1, 0, 1, 1])
    rates = summarize(p_model_wins=[1, 0.5, 0], reference_lengths=[90, 80, 70], model_lengths=[100, 60, 75])
    print(rates.win_rate, rates.lc_win_rate)
"""
