"""The engine in a process of its own. In reading order:

- `client`: the `Engine` that the module uses. `active_worker` knows which worker serves.
- `supervisor`: takes events, asks `recovery_policy` (pure), carries out the steps. `device_prober` and
  `candidate_comparison` do two of them on other threads.
- `worker_pool`, `worker`: processes that are started, followed, asked and ended; `adaptive_timeout` limits a
  batch.
- `server`: what runs in the process. `protocol` and `shared_memory` connect the two.
- `fault_injection`: faults by script, for tests; not in the images.
"""
