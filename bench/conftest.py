"""What a saved run says of the machine: its processor, threads and versions, not its name."""

from typing import Any

import torch


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    kept = {
        name: machine_info[name] for name in ("machine", "system", "python_version") if name in machine_info
    }
    machine_info.clear()
    machine_info.update(kept)
    machine_info["cpu"] = {name: cpu.get(name) for name in ("brand_raw", "count")}
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
