// The schemas of the raw ops, for a process without Python. Elsewhere part_fast/backends.py defines them, with a
// reference, fake tensors and overloads beside each; here there is nobody else.
#include <torch/csrc/stable/library.h>

// Python's own, where this process has one.
extern "C" __attribute__((weak)) int Py_IsInitialized();

STABLE_TORCH_LIBRARY_FRAGMENT(part_fast, m) {
  if (Py_IsInitialized != nullptr && Py_IsInitialized()) return;
  m.def(
      "_bank_start(Tensor x, Tensor bank, Tensor places, Tensor? eps, float eps_high, float eps_low, float unit, "
      "float clip_low, float clip_high) -> Tensor");
  m.def("_cam(Tensor activation, Tensor gradient, int method) -> Tensor");
  m.def("_cam_mask(Tensor cam, SymInt height, SymInt width, int rule, SymInt k, bool packed) -> Tensor");
  m.def(
      "_epsilon_map(Tensor cam, SymInt height, SymInt width, int rule, SymInt k, float eps, float eps_low) -> Tensor");
  m.def(
      "_eps_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor? eps, float eps_high, float eps_low, float step, "
      "bool of_eps, bool project, float clip_low, float clip_high, Tensor(b!)? bank, Tensor? places, float levels) -> "
      "()");
  m.def(
      "_pgd_step(Tensor x_adv, Tensor grad, Tensor x, Tensor? eps, float eps_high, float eps_low, float alpha, "
      "float clip_low, float clip_high) -> Tensor");
  m.def(
      "_pgd_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor? eps, float eps_high, float eps_low, float alpha, "
      "float clip_low, float clip_high) -> ()");
  m.def(
      "_pgd_step_bwd(Tensor grad_out, Tensor x_adv, Tensor grad, Tensor x, Tensor? eps, float eps_high, "
      "float eps_low, float alpha, float clip_low, float clip_high) -> (Tensor, Tensor, Tensor)");
  m.def("_project_linf(Tensor x_adv, Tensor x, Tensor? eps, float eps_high, float eps_low) -> Tensor");
  m.def(
      "_project_linf_bwd(Tensor grad_out, Tensor x_adv, Tensor x, Tensor? eps, float eps_high, float eps_low) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "_uniform_start(Tensor x, Tensor? eps, float eps_high, float eps_low, float scale, SymInt seed, "
      "float clip_low, float clip_high) -> Tensor");
  m.def("_upsample_cam(Tensor cam, SymInt height, SymInt width) -> Tensor");
  m.def("_upsample_cam_bwd(Tensor grad_out, Tensor cam) -> Tensor");
  m.def("_winograd_weight_(Tensor(a!) u, Tensor weight, bool transposed) -> ()");
  m.def(
      "_winograd_(Tensor(a!) y, Tensor x, Tensor? x_positive, Tensor u, Tensor? bias, Tensor? other, "
      "Tensor? other_positive, bool relu) -> ()");
}
