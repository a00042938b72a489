"""What Flower executes at its start (``--conf``): it adds our pages, and how a row of its list of tasks is written.

Names of Flower's options that are set here are options; there is ``format_task`` alone.
"""

from worker.flower import pages, rows

pages.add()
format_task = rows.format_task
