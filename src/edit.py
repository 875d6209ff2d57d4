"""Edit images: `python src/edit.py task=inpaint input=<image or folder> checkpoint=<run or file>`; conf/edit.yaml has
the options.
"""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.edit import edit

    command("edit")(edit)()
