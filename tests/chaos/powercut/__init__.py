"""Power cuts, replayed: what two nodes leave on their disks at any moment, on disks with a volatile cache.

    workload.py   two real nodes on recording disks, a client that notes what it was acknowledged -> history.py
    history.py    a recording: requests and their acknowledgements, what both disks were asked to do, and when
    cut.py        states that the disks could have been left in by a cut at a moment
    promise.py    what was promised at a moment, sector by sector, and to which node it applies
    judge.py      holds states against promises, with the handshake and the rules that hastd has
    revive.py     starts real nodes from such states, and holds what their clients read against the promises
    live.py       cuts one real node while the other one goes on

`python -m tests.chaos.powercut` runs it by hand, for as many states as are asked for; test_powercut.py is the short
form.
"""
