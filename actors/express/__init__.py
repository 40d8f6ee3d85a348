"""Express: routers and expert shards serve their common frames without the interpreter, while they wait for others.

Compiled (``src/``), and told what to do here. A frame is express where everything about it is ordinary: it is small
and comes over shared memory, it is neither traced nor recorded, every expert has a shard that lives, and there is room
for what is to be sent. Any other is left where it lies and told to the :class:`~actors.transport.poller.Poller`, whose
way is the general one in ``dispatcher.py`` and ``expert.py``: the same frames, numbers and kernels, bit for bit.

Outside :meth:`~actors.transport.poller.Express.wait` nothing is under way here: what was is handed over first. So
whoever loses a shard, changes the map or gives up a batch never has to know of this.
"""
