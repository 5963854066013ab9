"""The engine in a process of its own. In reading order:

- `client`: the `Engine` that the module uses.
- `supervisor`: takes events, asks `recovery_policy` (pure), carries out the steps; knows which worker serves.
- `worker_pool`: the worker processes, and the probe of a device.
- `worker`: one process, started, followed, asked and ended, with a timeout for each batch.
- `server`: what runs in the process. `protocol` and `shared_memory` connect the two.
- `fault_injection`: faults by script, for tests; not in the images.
"""
