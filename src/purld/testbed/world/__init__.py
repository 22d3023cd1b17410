"""The demo's world: problems with known answers, in words and in images, and what tells right answers from wrong ones.

from purld.testbed.world.world import check_answer, generate_problems, teacher_answer

problem = generate_problems("counting", "train", 1, seed=0)[0]
check_answer(to_prompt(problem), teacher_answer(problem))  # True
"""
