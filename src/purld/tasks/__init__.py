"""The paper's tasks: readers of their published data sets, and the checks that decide whether an answer is correct.

training, held_out = load_task("competition_math_counting", "data/MATH")  # purld.tasks.registry
is_correct = find_check(config.data)                                      # purld.tasks.checks
is_correct(prompt, "The answer is $\\boxed{4}$.")
"""
