// Runs a library of export/library.py on a phone: times prefill and decode, or prints greedy tokens.
//
//   runner --prompts 64,512,2000 --new-tokens 128 --repeats 5 --warm-up 1 --threads 4
//   runner --tokens 1,5,9 --new-tokens 16 --threads 4
//
// Works in its own folder: the libraries armv8.so and fhm.so, of which the processor decides, and weights/ with
// tensor-cache.json and its shards. Prints lines of progress, then one line of JSON. What is asked for and cannot be
// done ends with a line on standard error and exit code 1.

#include <sys/auxv.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr int64_t kSequence = 0;         // the cache holds one sequence, of this name
constexpr int kPooledAllocator = 2;      // of TVM's virtual machine: buffers are kept between calls
constexpr int kLargeCoresFirst = 1;      // of TVM's thread pool
constexpr size_t kAlignment = 64;        // bytes, as TVM's code expects of every tensor
constexpr unsigned long kFhm = 1 << 23;  // HWCAP_ASIMDFHM of Linux on aarch64

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct AlignedMemory {
  void AllocData(DLTensor* tensor) {
    size_t bytes = ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Empty(const ffi::Shape& shape, DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(AlignedMemory(), shape, dtype, kCpu);
}

ffi::Function Builtin(const std::string& name) { return ffi::Function::GetGlobalRequired(name); }

// The words after the program's name, each flag with its value.
class Arguments {
 public:
  Arguments(int count, char** words) {
    if (count % 2 == 0) throw std::runtime_error("every flag takes a value");
    for (int i = 1; i < count; i += 2) values_[words[i]] = words[i + 1];
  }
  bool Has(const std::string& flag) const { return values_.count(flag) > 0; }
  int64_t Number(const std::string& flag) const { return Numbers(flag).at(0); }
  std::vector<int64_t> Numbers(const std::string& flag) const {
    if (!Has(flag)) throw std::runtime_error(flag + " is missing");
    std::vector<int64_t> numbers;
    std::istringstream words(values_.at(flag));
    for (std::string word; std::getline(words, word, ',');) numbers.push_back(std::stoll(word));
    if (numbers.empty()) throw std::runtime_error(flag + " takes numbers");
    return numbers;
  }

 private:
  std::map<std::string, std::string> values_;
};

// A weight as fp32, for libraries that compute with that: on the disk they are all fp16.
ffi::Tensor Widened(const ffi::Tensor& weight) {
  ffi::Tensor wide = Empty(weight.shape(), DLDataType{kDLFloat, 32, 1});
  const auto* from = static_cast<const __fp16*>(weight.data_ptr());
  std::copy(from, from + weight.numel(), static_cast<float*>(wide.data_ptr()));
  return wide;
}

class Model {
 public:
  Model() : name_(getauxval(AT_HWCAP) & kFhm ? "fhm" : "armv8") {
    ffi::Module library = ffi::Module::LoadFromFile("./" + name_ + ".so");
    ffi::Module machine = Of(library, "vm_load_executable")().cast<ffi::Module>();
    Of(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    prefill_ = Of(machine, "prefill");
    decode_ = Of(machine, "decode");
    metadata_ = ffi::json::Parse(Of(machine, "palmtop_metadata")().cast<ffi::String>()).cast<ffi::json::Object>();
    LoadWeights();
    cache_ = Of(machine, "create_kv_cache")(ffi::Shape({context()}));
  }

  const std::string& name() const { return name_; }
  int64_t context() const { return metadata_["context"].cast<int64_t>(); }
  int64_t vocab() const { return metadata_["vocab"].cast<int64_t>(); }

  // Reads a prompt into an empty cache; returns the likeliest token after it.
  int32_t Prefill(const std::vector<int32_t>& ids) {
    clear_(cache_);
    add_sequence_(cache_, kSequence);
    const auto chunk = metadata_["prefill_chunk"].cast<size_t>();
    int32_t next = 0;
    for (size_t start = 0; start < ids.size(); start += chunk) {
      size_t end = std::min(start + chunk, ids.size());
      next = Forward(prefill_, {ids.begin() + start, ids.begin() + end});
    }
    return next;
  }

  // Puts one token after what the cache holds; returns the likeliest after it.
  int32_t Decode(int32_t id) { return Forward(decode_, {id}); }

 private:
  static ffi::Function Of(const ffi::Module& module, const std::string& name) {
    ffi::Optional<ffi::Function> function = module->GetFunction(name);
    if (!function.has_value()) throw std::runtime_error("the library has no function " + name);
    return *function;
  }

  // Moves each weight out of TVM's cache in the order of the library, so that none is held twice.
  void LoadWeights() {
    Builtin("vm.builtin.tensor_cache.load")("weights", static_cast<int>(kDLCPU), 0);
    ffi::Function get = Builtin("vm.builtin.tensor_cache.get"), remove = Builtin("vm.builtin.tensor_cache.remove");
    for (const ffi::Any& one : metadata_["params"].cast<ffi::json::Array>()) {
      auto described = one.cast<ffi::json::Object>();
      auto name = described["name"].cast<ffi::String>();
      auto found = get(name).cast<ffi::Optional<ffi::Tensor>>();
      if (!found.has_value()) throw std::runtime_error("weights/ has no " + std::string(name));
      bool widen = described["dtype"].cast<ffi::String>() == "float32" && found.value().dtype().bits == 16;
      weights_.push_back(widen ? Widened(*found) : *found);
      remove(name);
    }
  }

  int32_t Forward(const ffi::Function& function, const std::vector<int32_t>& ids) {
    const auto count = static_cast<int64_t>(ids.size());
    ffi::Tensor input = Empty({1, count}, kInt32);
    std::copy(ids.begin(), ids.end(), static_cast<int32_t*>(input.data_ptr()));
    begin_forward_(cache_, ffi::Shape({kSequence}), ffi::Shape({count}));
    auto logits = function(input, cache_, weights_).cast<ffi::Tensor>();
    end_forward_(cache_);
    const auto* first = static_cast<const float*>(logits.data_ptr());
    return static_cast<int32_t>(std::max_element(first, first + vocab()) - first);
  }

  std::string name_;
  ffi::Function prefill_, decode_;
  ffi::json::Object metadata_;
  ffi::Array<ffi::Tensor> weights_;
  ffi::Any cache_;
  ffi::Function clear_ = Builtin("vm.builtin.kv_state_clear");
  ffi::Function add_sequence_ = Builtin("vm.builtin.kv_state_add_sequence");
  ffi::Function begin_forward_ = Builtin("vm.builtin.kv_state_begin_forward");
  ffi::Function end_forward_ = Builtin("vm.builtin.kv_state_end_forward");
};

// Token ids that lie all over the vocabulary, so that the embedding is not read from a processor's cache.
std::vector<int32_t> Prompt(int64_t tokens, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t place = 0; place < tokens; ++place) ids.push_back(static_cast<int32_t>((7919 * place + 11) % vocab));
  return ids;
}

// Seconds to the first token after a prompt, and of the new tokens after it; no token ends it early.
std::pair<double, double> Timed(Model& model, const std::vector<int32_t>& prompt, int64_t new_tokens) {
  double start = Now();
  int32_t token = model.Prefill(prompt);
  double read = Now();
  for (int64_t i = 0; i < new_tokens; ++i) token = model.Decode(token);
  return {read - start, Now() - read};
}

// The protocol of export/timing.py, and its answer.
ffi::json::Array Measure(Model& model, const Arguments& asked) {
  int64_t context = model.context(), wanted_new = asked.Number("--new-tokens");
  int64_t room = std::max<int64_t>(1, std::max(context - wanted_new, context / 2));
  int64_t warm_up = asked.Number("--warm-up"), runs = warm_up + asked.Number("--repeats");
  std::vector<int64_t> prompts;
  for (int64_t wanted : asked.Numbers("--prompts")) {
    int64_t tokens = std::min(wanted, room);
    if (std::find(prompts.begin(), prompts.end(), tokens) == prompts.end()) prompts.push_back(tokens);
  }
  ffi::json::Array found;
  for (int64_t tokens : prompts) {
    int64_t new_tokens = std::max<int64_t>(1, std::min(wanted_new, context - tokens));
    ffi::json::Array prefill, decode, first_token;
    for (int64_t run = 0; run < runs; ++run) {
      std::cout << "prompt of " << tokens << " tokens, run " << run + 1 << " of " << runs << std::endl;
      auto [read, decoded] = Timed(model, Prompt(tokens, model.vocab()), new_tokens);
      if (run < warm_up) continue;
      prefill.push_back(static_cast<double>(tokens) / read);
      decode.push_back(static_cast<double>(new_tokens) / decoded);
      first_token.push_back(read);
    }
    found.push_back(ffi::json::Object{
        {"tokens", tokens}, {"prefill", prefill}, {"decode", decode}, {"first_token", first_token}});
  }
  return found;
}

ffi::json::Array Generate(Model& model, const Arguments& asked) {
  std::vector<int32_t> prompt;
  for (int64_t id : asked.Numbers("--tokens")) prompt.push_back(static_cast<int32_t>(id));
  int32_t token = model.Prefill(prompt);
  ffi::json::Array tokens{static_cast<int64_t>(token)};
  while (static_cast<int64_t>(tokens.size()) < asked.Number("--new-tokens")) {
    token = model.Decode(token);
    tokens.push_back(static_cast<int64_t>(token));
  }
  return tokens;
}

// The words after a name in one of Linux's tables of "name: value"; empty where there is none.
std::string Listed(const std::string& file, const std::string& name) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(name, 0) != 0) continue;
    std::string value = line.substr(line.find(':') + 1);
    return value.substr(std::min(value.find_first_not_of(" \t"), value.size()));
  }
  return "";
}

void Run(const Arguments& asked) {
  // The thread pool reads this when it starts; without a number of its own it takes the cores of the highest clock
  // alone, on many phones one.
  setenv("TVM_NUM_THREADS", std::to_string(asked.Number("--threads")).c_str(), 1);
  Builtin("runtime.config_threadpool")(kLargeCoresFirst, asked.Number("--threads"));
  double start = Now();
  Model model;
  ffi::json::Object result{{"library", ffi::String(model.name())},
                           {"context", model.context()},
                           {"threads", Builtin("runtime.NumThreads")()},
                           {"load_seconds", Now() - start},
                           // An emulated processor shows the table of the machine that emulates it.
                           {"arm", !Listed("/proc/cpuinfo", "CPU implementer").empty()}};
  if (asked.Has("--tokens")) {
    result.Set("tokens", Generate(model, asked));
  } else {
    result.Set("runs", Measure(model, asked));
  }
  result.Set("peak_memory", static_cast<int64_t>(std::stoll(Listed("/proc/self/status", "VmHWM")) * 1024));
  std::cout << ffi::json::Stringify(result) << std::endl;
}

}  // namespace

int main(int count, char** words) {
  try {
    Run(Arguments(count, words));
  } catch (const std::exception& error) {
    std::cerr << "runner: " << error.what() << std::endl;
    return 1;
  }
}
