// Runs calls of part_fast.h that tests/test_from_cpp.py writes down. Usage: ops_from_cpp _C.abi3.so INPUT.pt OUTPUT.pt.
// INPUT holds a list of dictionaries, a call each. OUTPUT holds for each the tensor it gives, or its error as a string.
#include <part_fast.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

using at::Tensor;
using c10::IValue;

struct Call {
  c10::Dict<IValue, IValue> arguments;

  IValue get(const char* name) const { return arguments.at(name); }
  bool has(const char* name) const { return arguments.contains(name); }
  // None is an undefined tensor. Whether one requires a gradient is not read from a file, so the call says it.
  Tensor tensor(const char* name) const {
    if (get(name).isNone()) return Tensor();
    const Tensor value = get(name).toTensor();
    return has("requires_grad") && text("requires_grad") == name ? value.requires_grad_() : value;
  }
  std::string text(const char* name) const { return get(name).toStringRef(); }
  double number(const char* name) const { return get(name).toDouble(); }
  std::array<int64_t, 2> size() const {
    const auto& pair = get("size").toTupleRef().elements();
    return {pair[0].toInt(), pair[1].toInt()};
  }
  std::array<double, 2> clip() const {
    if (get("clip").isNone()) return part_fast::UNCLIPPED;
    const auto& pair = get("clip").toTupleRef().elements();
    return {pair[0].toDouble(), pair[1].toDouble()};
  }
  // A number, a tensor, or (bits, height, width, eps, eps_low).
  part_fast::Eps eps() const {
    const IValue value = get("eps");
    if (value.isDouble()) return value.toDouble();
    if (!value.isTuple()) return tensor("eps");
    const auto& parts = value.toTupleRef().elements();
    return part_fast::PackedEpsilon{parts[0].toTensor(), parts[1].toInt(), parts[2].toInt(), parts[3].toDouble(),
                                    parts[4].toDouble()};
  }
};

// The bank that a call names, if it names one.
std::optional<part_fast::Bank> bank_of(const Call& call) {
  if (!call.has("bank")) return std::nullopt;
  return part_fast::Bank{call.tensor("bank"), call.tensor("places"), call.number("scale")};
}

// x, or eps expanded, one element behind x_adv in the same memory.
Tensor overlapping(const std::string& argument) {
  const Tensor memory = at::zeros({13}), other = at::zeros({1, 1, 3, 4});
  Tensor x_adv = memory.slice(0, 0, 12).view({1, 1, 3, 4});
  if (argument == "eps") return part_fast::pgd_step_(x_adv, other, other, x_adv.slice(3, 1, 2), .1);
  const Tensor behind = memory.slice(0, 1, 13).view({1, 1, 3, 4});
  if (argument == "x") return part_fast::pgd_step_(x_adv, other, behind, .1, .1);
  return part_fast::pgd_step_(x_adv, behind, other, .1, .1);
}

// The gradient of x^2 after x was written.
Tensor written_before_backward(const Call& call) {
  Tensor x_adv = call.tensor("x_adv").clone();
  const Tensor from = x_adv.detach().requires_grad_();
  const Tensor loss = from.square().sum();
  part_fast::pgd_step_(x_adv, call.tensor("grad"), call.tensor("x"), call.eps(), .1);
  loss.backward();
  return from.grad();
}

Tensor run(const Call& call) {
  const std::string op = call.text("op");
  std::optional<at::NoGradGuard> no_grad;
  if (call.has("no_grad")) no_grad.emplace();
  if (op == "cam") return part_fast::cam(call.tensor("activation"), call.tensor("gradient"), call.text("method"));
  if (op == "upsample_cam") return part_fast::upsample_cam(call.tensor("cam"), call.size());
  if (op == "cam_mask") return part_fast::cam_mask(call.tensor("cam"), call.size(), call.text("rule"));
  if (op == "project_linf") return part_fast::project_linf(call.tensor("x_adv"), call.tensor("x"), call.eps());
  if (op == "overlapping") return overlapping(call.text("argument"));
  if (op == "written_before_backward") return written_before_backward(call);
  if (op == "epsilon_map" || op == "packed_epsilon_map") {
    const auto [eps, eps_low] = std::pair(call.number("eps"), call.number("eps_low"));
    if (op == "epsilon_map") {
      return part_fast::epsilon_map(call.tensor("cam"), call.size(), eps, eps_low, call.text("rule"));
    }
    return part_fast::packed_epsilon_map(call.tensor("cam"), call.size(), eps, eps_low, call.text("rule")).bits;
  }
  if (op == "uniform_start") {
    const int64_t seed = call.get("seed").toInt();
    return part_fast::uniform_start(call.tensor("x"), call.eps(), seed, call.number("scale"), call.clip());
  }
  if (op == "bank_start") return part_fast::bank_start(call.tensor("x"), *bank_of(call), call.eps(), call.clip());
  Tensor x_adv = call.tensor("x_adv");
  const auto [grad, x] = std::pair(call.tensor("grad"), call.tensor("x"));
  if (op == "pgd_step") return part_fast::pgd_step(x_adv, grad, x, call.eps(), call.number("alpha"), call.clip());
  if (op == "eps_step_") {
    const auto bank = bank_of(call);
    part_fast::eps_step_(x_adv, grad, x, call.eps(), call.number("factor"), call.clip(), call.get("project").toBool(),
                         bank);
    // Both that were written, of one type.
    return bank ? at::cat({x_adv.flatten().to(at::kDouble), bank->values.flatten().to(at::kDouble)}) : x_adv;
  }
  TORCH_CHECK(op == "pgd_step_", "no op of this name: ", op);
  return part_fast::pgd_step_(x_adv, grad, x, call.eps(), call.number("alpha"), call.clip());
}

IValue result_of(const Call& call) try { return run(call); } catch (const c10::Error& error) {
  return std::string(error.what_without_backtrace());
}

int main(int count, char** arguments) try {
  TORCH_CHECK(count == 4, "usage: ops_from_cpp _C.abi3.so INPUT.pt OUTPUT.pt");
  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<IValue> results;
  bool loaded = false;
  const IValue calls = torch::jit::pickle_load(bytes);
  for (const IValue& call : calls.toListRef()) {
    const Call one{call.toGenericDict()};
    if (!loaded && !one.has("before_load")) {
      part_fast::load(arguments[1]);
      loaded = true;
    }
    results.push_back(result_of(one));
  }
  const std::vector<char> written = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(results)));
  std::ofstream(arguments[3], std::ios::binary).write(written.data(), static_cast<std::streamsize>(written.size()));
  return 0;
} catch (const c10::Error& error) {
  fprintf(stderr, "%s\n", error.what_without_backtrace());
  return 1;
}
