// The Python module _C: what is not a tensor op. What was built, which kernels there are, how a configuration is chosen.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "host/op_table.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = LOWFAT_VERSION;
  info["torch"] = LOWFAT_BUILT_TORCH;
  info["torch_minimum"] = LOWFAT_TORCH_MINIMUM;
  info["python"] = LOWFAT_BUILT_PYTHON;
  info["compiler"] = LOWFAT_BUILT_COMPILER;
  info["cuda"] = LOWFAT_BUILT_CUDA;  // of nvcc; empty without CUDA kernels
  info["cuda_archs"] = compiled_cuda_archs();
  info["sanitize"] = std::string(LOWFAT_BUILT_SANITIZE) == "ON";
  return info;
}

py::dict kernels() {
  py::dict all;
  for (const Op& op : op_table()) {
    py::dict devices;
    devices["cpu"] = op.cpu;
    devices["cuda"] = op.cuda;
    all[op.name.c_str()] = devices;
  }
  return all;
}

template <class Value>
Value pick(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Value>> choices) {
  std::string valid;
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
    valid += (valid.empty() ? "" : ", ") + std::string(choice);
  }
  throw py::value_error("choose_config: " + std::string(what) + " is '" + name + "', known are " + valid);
}

py::dict choose_config(const std::string& op_name, int64_t m, int64_t n, int64_t k, int64_t r, const std::string& dtype,
                       const std::string& device, const std::optional<std::string>& level,
                       const std::optional<bool>& has_tiles, int arch, int sm_count, bool is_aligned, int members,
                       int64_t b_in, int64_t b_out, bool interleave, int64_t kept, int64_t group, int64_t entries,
                       int64_t pairs) {
  Problem problem;
  problem.m = m, problem.n = n, problem.k = k, problem.r = r;
  problem.dtype = pick<Dtype>("dtype", dtype, {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16},
                                               {"float16", Dtype::float16}, {"float64", Dtype::float64}});
  problem.device = pick<Device>("device", device, {{"cpu", Device::cpu}, {"cuda", Device::cuda}});
  problem.level = level ? pick<CpuLevel>("level", *level, {{"avx512_bf16", CpuLevel::avx512_bf16},
                                                           {"avx2_fma", CpuLevel::avx2_fma}, {"scalar", CpuLevel::scalar}})
                        : cpu_level();
  problem.has_tiles = has_tiles.value_or(cpu_has_tiles());
  problem.arch = arch, problem.sm_count = sm_count, problem.is_aligned = is_aligned;
  problem.members = members, problem.b_in = b_in, problem.b_out = b_out;
  problem.interleave = interleave, problem.kept = kept, problem.group = group;
  problem.entries = entries, problem.pairs = pairs;
  for (const Op& op : op_table()) {
    if (op.name != op_name) continue;
    py::dict config;
    for (const auto& [key, value] : op.choose_config(problem)) config[key.c_str()] = value;
    return config;
  }
  throw py::value_error("choose_config: no compiled op is named '" + op_name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info, "Versions and options of this build.");
  m.def("kernels", &kernels, "op -> device -> compiled levels or architectures.");
  m.def("cpu_level", [] { return name_of(cpu_level()); }, "The instruction set level in use.");
  m.def("choose_config", &choose_config, py::arg("op"), py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("r") = 0, py::arg("dtype") = "bfloat16", py::arg("device") = "cpu", py::arg("level") = py::none(),
        py::arg("has_tiles") = py::none(),
        py::arg("arch") = 90, py::arg("sm_count") = 132, py::arg("is_aligned") = true,
        py::arg("members") = 1, py::arg("b_in") = 1, py::arg("b_out") = 1, py::arg("interleave") = true,
        py::arg("kept") = 2, py::arg("group") = 4, py::arg("entries") = 0, py::arg("pairs") = 2,
        "The configuration that op uses for this problem, as a dict; `path` is what a call is counted under, or empty.");
}
