"""The real thing: two hastds, a client that knows what it was acknowledged, and somebody who breaks all the rest.

python -m tests.chaos.nemesis --faults 500 --seed 1        docs/reliability.md says what is checked

model.py     what a disk may hold, by what was acknowledged
client.py    an NBD client that keeps requests under way
cluster.py   two nodes, their processes, their link
operator.py  roles, promotions, and what is legitimate
faults.py    the table of faults
plan.py      what is chosen, by the seed
session.py   rounds of faults on one cluster
checker.py   what must be true when all is well again
story.py     what is told, and kept, of a failure
"""
