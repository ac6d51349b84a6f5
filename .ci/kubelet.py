"""A kubelet for .ci/install: the simulated one of support.py, on the usual directory; it says when a device came."""

import asyncio
import sys
import time

sys.path.insert(0, "/opt/smarter-device-manager")
import support

import smarter_device_manager as sdm


async def main() -> None:
    kubelet = support.SimulatedKubelet(sdm.DEFAULT_PLUGIN_DIR)
    await kubelet.start()
    started = time.monotonic()
    said = set()
    while True:
        for name in kubelet.clients.keys() - said:
            if kubelet.clients[name].lists:
                said.add(name)
                seconds = time.monotonic() - started
                print(f"{name} has {len(kubelet.devices(name))} slots after {seconds:.3f} s", flush=True)
        await asyncio.sleep(0.005)


asyncio.run(main())
