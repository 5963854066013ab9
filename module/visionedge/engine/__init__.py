"""The engine: batches of frames in, detections out. In reading order:

- `batcher`: the newest frame of each camera waits here; a batch forms while the lanes are busy.
- `reorder_buffer`: the results of a camera in the order of its frames again.
- `lanes`: threads that take a batch, infer and deliver; how one engine replaces another.
- `interface`: an engine is `infer`, `info` and `close`.
- `local_engine`: the engine in this process, on the best device. `candidates` lists the engines of a device
  and opens one, `engine_choice` measures which, `candidate_parity` compares them with onnxruntime on the CPU,
  as `device_parity` does a device; `autotune` measures the plan, `plan` keeps it.
- `device/`: onnxruntime's sessions, their options, and the meaning of a device's errors.
- `process/`: the same engine in a worker process, with a supervisor that restarts it.
"""
