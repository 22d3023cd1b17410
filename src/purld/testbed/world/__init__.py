"""Problems with known answers, in words and in images, and the rules that tell right answers from wrong ones.

    from purld.testbed.world.world import check_answer, generate_problems, teacher_answer, to_prompt

    (problem,) = generate_problems("counting", "train", 1, seed=0)
    check_answer(to_prompt(problem), teacher_answer(problem))  # True

`world` is the entry point; `counting`, `writing` and `seeing` are its domains. No model and no network is used here.
"""
