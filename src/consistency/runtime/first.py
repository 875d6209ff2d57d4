"""What the script of every command imports first: from here on Ctrl-C ends it in one line, also while it imports."""

from consistency.runtime.interrupt import listen

listen()
