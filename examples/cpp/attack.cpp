// PGD with an eps per pixel, in C++: a network with the weights that Python saved, its class activation maps, each
// pixel's eps from them, ten steps. Usage: attack _C.abi3.so INPUT.pt OUTPUT.pt; examples/from_cpp.py runs it.
#include <part_fast.h>
#include <torch/torch.h>

#include <fstream>
#include <iterator>
#include <map>

struct Network : torch::nn::Module {
  Network() {
    namespace nn = torch::nn;
    features = register_module(
        "features", nn::Sequential(nn::Conv2d(nn::Conv2dOptions(3, 8, 3).padding(1)), nn::ReLU(),
                                   nn::Conv2d(nn::Conv2dOptions(8, 16, 3).padding(1).stride(2)), nn::ReLU()));
    head = register_module("head", nn::Linear(16, 10));
  }
  torch::Tensor classify(const torch::Tensor& activation) { return head(activation.mean({2, 3})); }
  torch::Tensor forward(const torch::Tensor& x) { return classify(features->forward(x)); }

  torch::nn::Sequential features{nullptr};
  torch::nn::Linear head{nullptr};
};

using Tensors = std::map<std::string, torch::Tensor>;

// A dictionary of tensors, as torch.save writes it.
Tensors read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  Tensors result;
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  for (const auto& entry : torch::pickle_load(bytes).toGenericDict()) {
    result[entry.key().toStringRef()] = entry.value().toTensor();
  }
  return result;
}

// Pairs of name and tensor, which torch.load(weights_only=True) reads; a c10::Dict it would not.
void write(const char* path, const Tensors& tensors) {
  std::vector<c10::IValue> pairs;
  for (const auto& [name, value] : tensors) pairs.push_back(c10::ivalue::Tuple::create(name, value));
  const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(pairs));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

int main(int count, char** arguments) try {
  TORCH_CHECK(count == 4, "usage: attack _C.abi3.so INPUT.pt OUTPUT.pt");
  part_fast::load(arguments[1]);
  const Tensors input = read(arguments[2]);
  Network network;
  for (auto& parameter : network.named_parameters()) {
    parameter.value().set_data(input.at(parameter.key()));
    parameter.value().requires_grad_(false);
  }
  const torch::Tensor x = input.at("x"), y = input.at("y");
  Tensors output;

  // What the network looks at, for each image's own class.
  const torch::Tensor activation = network.features->forward(x).requires_grad_();
  const torch::Tensor score = network.classify(activation).gather(1, y.unsqueeze(1)).sum();
  const torch::Tensor gradient = torch::autograd::grad({score}, {activation})[0];
  const torch::Tensor cam = part_fast::cam(activation.detach(), gradient);
  const torch::Tensor eps = part_fast::epsilon_map(cam, {x.size(2), x.size(3)}, 8. / 255, 7. / 255);
  const auto packed = part_fast::packed_epsilon_map(cam, {x.size(2), x.size(3)}, 8. / 255, 7. / 255);

  torch::Tensor x_adv = x.clone();
  for (int step = 0; step < 10; ++step) {
    const torch::Tensor from = x_adv.detach().requires_grad_();
    const torch::Tensor loss = torch::nn::functional::cross_entropy(network.forward(from), y);
    part_fast::pgd_step_(x_adv, torch::autograd::grad({loss}, {from})[0], x, eps, 2. / 255);
  }
  output["cam"] = cam;
  output["mask"] = part_fast::cam_mask(cam, {x.size(2), x.size(3)}, "quantile:0.25");
  output["eps"] = eps;
  output["bits"] = packed.bits;
  output["x_adv"] = x_adv;
  output["projected"] = part_fast::project_linf(x_adv, x, packed);
  write(arguments[3], output);
  return 0;
} catch (const c10::Error& error) {
  fprintf(stderr, "%s\n", error.what_without_backtrace());
  return 1;
}
