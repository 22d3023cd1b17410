"""Write the report of a run or several: one self-contained HTML page with tables, figures and every answer.

`run_data` reads run directories; `headline`, `tables`, `figures`, `sensitivity`, `cost` and `answer_browser` each make
a part of the page; `page` puts them together.

    from pathlib import Path
    from purld.report.page import write_report
    from purld.runs.run_dir import RunDir

    write_report([RunDir("runs/demo-counting")], Path("report.html"))
"""
