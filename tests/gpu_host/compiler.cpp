// A stand-in for NVIDIA's run-time compiler beside driver.cpp: takes any source and gives what that driver loads.
#include <cstring>

static const char IMAGE[] = "simulated";

extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
    return *program = (void*)IMAGE, 0;
}
int nvrtcCompileProgram(void*, int, const char* const*) { return 0; }
int nvrtcDestroyProgram(void** program) { return *program = nullptr, 0; }
int nvrtcGetCUBINSize(void*, size_t* size) { return *size = sizeof IMAGE, 0; }
int nvrtcGetCUBIN(void*, char* to) { return std::memcpy(to, IMAGE, sizeof IMAGE), 0; }
const char* nvrtcGetErrorString(int) { return "no error"; }
}
