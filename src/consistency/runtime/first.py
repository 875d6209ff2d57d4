"""What the script of every command imports first: from here on Ctrl-C ends it in one line, also while it imports, and a
rank ends with the process that has started it.
"""

import multiprocessing
import os

from consistency.orphans import end_with
from consistency.runtime.interrupt import listen
from consistency.runtime.ranks import PARENT, is_started_here

listen()
if is_started_here() and multiprocessing.parent_process() is None:
    end_with(int(os.environ[PARENT]))
