"""What the script of every command imports first: from here on Ctrl-C ends it in one line, also while it imports, and a
rank ends with the process that has started it.
"""

import os

from consistency.orphans import end_with
from consistency.runtime.interrupt import is_worker, let_go, listen
from consistency.runtime.ranks import PARENT, is_started_here

listen()
let_go()
if is_started_here() and not is_worker():
    end_with(int(os.environ[PARENT]))
