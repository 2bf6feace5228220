// What the CUDA runtime inside the operator library sees, for `peft-kernels info`.
#pragma once

namespace pk {

// Whether an image in this library runs on a device of that compute capability: machine code of its major number and no
// later minor one, or the PTX of the latest architecture. Asks no device.
bool cuda_serves(int major, int minor);

// One line per device, "0: <name>, compute capability 9.0, 132 SMs, 139.8 GiB, runs sm_90 code", then one line with
// the versions of the driver and of the runtime; or one line that says why there is no device. Initialises CUDA.
// The text belongs to the library and is queried once per process.
const char* cuda_device_summary();

}  // namespace pk
