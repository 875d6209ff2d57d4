"""Train a consistency model or a teacher: `python src/train.py mode=ect data=digits`; conf/train.yaml has the options."""

from consistency.commands import start

start(__name__, "train")
