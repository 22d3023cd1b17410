"""The demo's offline world: problems with known answers, a server for teacher and judge, and tiny students.

    from purld.testbed.demo import prepare_demo
    from purld.testbed.server import TestbedServer

    with TestbedServer(api_key="secret") as server:
        ...  # any OpenAI client at server.base_url reaches testbed-teacher and testbed-judge
    with prepare_demo("counting", None, []) as (config, run_dir):
        ...  # what `purld demo` runs

`world` holds the problems and their checks, `students` the training of the tiny students that `shipped` lists.
"""
