// Local steps, shifts and ends of rounds, of flcore._core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "bindings/bindings.h"
#include "check.h"

namespace py = pybind11;

namespace flcore {

using Words = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

constexpr int OPERANDS = 5;  // x, g, q, state, out

// A table of groups and their pieces, made once and run many times. The memory belongs to Python.
class LocalCall {
 public:
  LocalCall(const std::vector<int64_t>& first_piece, const std::vector<int64_t>& numel,
            const std::vector<int>& dtype)
      : first_piece_(first_piece), numel_(numel), dtype_(dtype), first_tile_(numel.size() + 1),
        numbers_(groups()), all_(groups()) {
    FLCORE_CHECK(!first_piece.empty() && first_piece[0] == 0 &&
                     first_piece.back() == int64_t(numel.size()),
                 "first_piece: expected 0, ..., the number of pieces");
    FLCORE_CHECK(dtype.size() == numel.size(), "dtype: expected a code a piece");
    for (size_t k = 0; k < groups(); ++k) {
      FLCORE_CHECK(first_piece[k] <= first_piece[k + 1], "first_piece: expected growing numbers");
      all_[k] = int64_t(k);
    }
    for (size_t p = 0; p < numel.size(); ++p) {
      FLCORE_CHECK(numel[p] >= 0, "numel: expected sizes from 0");
      FLCORE_CHECK(dtype[p] >= 0 && dtype[p] < DTYPE_COUNT, "dtype: unknown code ", dtype[p]);
      first_tile_[p + 1] = first_tile_[p] + (numel[p] + LOCAL_TILE - 1) / LOCAL_TILE;
      total_ += numel[p];
    }
  }

  // Addresses of operand `slot`, one a piece; none: the operand is absent.
  void set(int slot, const std::vector<uintptr_t>& addresses) {
    auto& table = operand(slot);
    FLCORE_CHECK(addresses.empty() || addresses.size() == numel_.size(),
                 "addresses: expected one a piece");
    table = pointers<>(addresses);
  }

  // Addresses base, base + stride, ... ; a stride of 0 is one array for all pieces.
  void set_rows(int slot, uintptr_t base, int64_t stride) {
    auto& table = operand(slot);
    table.resize(numel_.size());
    for (size_t p = 0; p < table.size(); ++p)
      table[p] = reinterpret_cast<void*>(base + uintptr_t(stride) * p);
  }

  int64_t total() const { return total_; }

  // rate, alpha, decay, clip, momentum: one number, or float64 [groups]; clip None: no clipping.
  void run(int kind, py::handle rate, py::handle alpha, py::handle decay, py::handle clip,
           py::handle momentum, bool full, bool nesterov, bool first, bool with_q, double eps,
           py::object active, py::object norms, int threads) {
    FLCORE_CHECK(kind >= 0 && kind < LOCAL_KIND_COUNT, "kind: unknown code ", kind);
    const bool x = kind != LOCAL_NORM, g = true, q = with_q || kind == LOCAL_CONTROL;
    const bool state = kind == LOCAL_DUAL || kind == LOCAL_CONTROL;
    const bool out = kind >= LOCAL_SHIFT;
    const bool wanted[OPERANDS] = {x, g, q, state, out};
    for (int slot = 0; slot < OPERANDS; ++slot)
      FLCORE_CHECK(!wanted[slot] || numel_.empty() || !table_[slot].empty(), "operand ", slot,
                   " is missing");
    fill(rate, &LocalNumbers::rate);
    fill(alpha, &LocalNumbers::alpha);
    fill(decay, &LocalNumbers::decay);
    fill(momentum, &LocalNumbers::momentum);
    if (!clip.is_none()) fill(clip, &LocalNumbers::clip);
    const std::vector<int64_t>* chosen = &all_;
    size_t count = groups();
    if (PyLong_Check(active.ptr())) {
      count = py::cast<size_t>(active);
      FLCORE_CHECK(count <= groups(), "active: expected at most ", groups(), ", got ", count);
    } else if (!active.is_none()) {
      const auto flags = py::cast<py::array_t<bool, py::array::c_style>>(active);
      FLCORE_CHECK(size_t(flags.size()) == groups(), "active: expected ", groups(), " flags, got ",
                   flags.size());
      some_.clear();
      for (size_t k = 0; k < groups(); ++k)
        if (flags.data()[k]) some_.push_back(int64_t(k));
      chosen = &some_;
      count = some_.size();
    }
    LocalArgs args{};
    args.kind = kind;
    args.count = int64_t(count);
    args.group = chosen->data();
    args.first_piece = first_piece_.data();
    args.first_tile = first_tile_.data();
    args.numel = numel_.data();
    args.dtype = dtype_.data();
    args.x = table(0);
    args.g = table(1);
    args.q = q ? table(2) : nullptr;
    args.state = table(3);
    args.out = table(4);
    args.numbers = numbers_.data();
    args.eps = eps;
    args.clipped = !clip.is_none();
    args.full = full;
    args.nesterov = nesterov;
    args.first = first;
    if (!norms.is_none()) {
      auto target = py::cast<py::array_t<double, py::array::c_style>>(norms);
      FLCORE_CHECK(size_t(target.size()) == groups(), "norms: expected float64 [groups]");
      args.norms = target.mutable_data();
    }
    args.threads = threads < 1 ? 1 : threads;
    if (args.threads > 1) tiles_.resize(size_t(first_tile_.back()));
    args.tiles = args.threads > 1 ? tiles_.data() : nullptr;
    if (total_ < 1024) return cpu().local_step->run(args);  // done before the lock is back
    py::gil_scoped_release nogil;
    cpu().local_step->run(args);
  }

 private:
  size_t groups() const { return first_piece_.empty() ? 0 : first_piece_.size() - 1; }

  std::vector<void*>& operand(int slot) {
    FLCORE_CHECK(slot >= 0 && slot < OPERANDS, "slot: unknown operand ", slot);
    return table_[slot];
  }
  void* const* table(int slot) const {
    return table_[slot].empty() ? nullptr : table_[slot].data();
  }

  void fill(py::handle value, double LocalNumbers::*member) {
    if (PyFloat_Check(value.ptr())) {
      const double number = PyFloat_AS_DOUBLE(value.ptr());
      for (LocalNumbers& n : numbers_) n.*member = number;
      return;
    }
    const auto array = py::cast<Doubles>(value);
    FLCORE_CHECK(size_t(array.size()) == groups(), "numbers: expected ", groups(), ", got ",
                 array.size());
    for (size_t k = 0; k < groups(); ++k) numbers_[k].*member = array.data()[k];
  }

  std::vector<int64_t> first_piece_, numel_;
  std::vector<int> dtype_;
  std::vector<int64_t> first_tile_;
  std::vector<LocalNumbers> numbers_;
  std::vector<int64_t> all_, some_;
  std::vector<void*> table_[OPERANDS];
  std::vector<double> tiles_;
  int64_t total_ = 0;
};

void bind_local_step(py::module_& m) {
  m.attr("LOCAL_TILE") = LOCAL_TILE;
  m.attr("LOCAL_LANES") = LOCAL_LANES;
  m.attr("LOCAL_JOIN") = LOCAL_JOIN;
  py::class_<LocalCall>(m, "LocalCall", "Groups of pieces (csrc/cpu/local_step.isa.cpp).")
      .def(py::init<const std::vector<int64_t>&, const std::vector<int64_t>&,
                    const std::vector<int>&>(),
           py::arg("first_piece"), py::arg("numel"), py::arg("dtype"))
      .def("set", &LocalCall::set, py::arg("slot"), py::arg("addresses"))
      .def("set_rows", &LocalCall::set_rows, py::arg("slot"), py::arg("base"), py::arg("stride"))
      .def("run", &LocalCall::run, py::arg("kind"), py::arg("rate"), py::arg("alpha"),
           py::arg("decay"), py::arg("clip"), py::arg("momentum"), py::arg("full"),
           py::arg("nesterov"), py::arg("first"), py::arg("with_q"), py::arg("eps"),
           py::arg("active"), py::arg("norms"), py::arg("threads"),
           "One pass over the groups; numbers are floats or float64 arrays, one a group. active: "
           "None, how many of the first groups, or bool [groups].");
}

}  // namespace flcore
