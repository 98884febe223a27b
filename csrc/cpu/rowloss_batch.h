// Row losses of a few classes with nothing but hard labels, a logit scale and upstream gradients:
// the frequent case. As rowloss_columns.h, a lane of a vector for each row; several vectors of rows
// go through each step together, so that the long chain of operations at the end of a row (a
// division, a logarithm, two more divisions) runs for all of them at once.
#pragma once

#include "api.h"
#include "cpu/isa.h"
#include "cpu/rowloss_access.h"
#include "cpu/rowloss_columns_io.h"
#include "cpu/rowloss_finish.h"
#include "cpu/rowmap.h"
#include "cpu/vec.h"

namespace flcore {
namespace FLCORE_ISA {
namespace {

constexpr int64_t BATCH_AHEAD = 2048;  // bytes that logits are fetched ahead
// Gradients of this size are written past the caches.
constexpr int64_t BATCH_STREAM_BYTES = 8 << 20;

FLCORE_INLINE void stream_vector(char* p, const vf32& v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  store(p, v);
#endif
}
// Other threads see what was streamed.
FLCORE_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <int MAP, int D>
struct ColumnBatch {
  typedef typename RowCompute<D>::Vector V;
  typedef typename RowCompute<D>::Number T;
  typedef typename Real<V>::I I;
  typedef typename Real<V>::N N;
  static constexpr int WIDTH = Real<V>::WIDTH, SIZE = Piece<V>::SIZE;
  static constexpr int HELD = 2 * COLUMNS, GROUPS = 8;

  const RowLossArgs& a;
  const int mode, classes;
  const bool stream;
  const V t;
  // of each group of rows
  int64_t first[GROUPS];
  int n[GROUPS];
  ColumnTargets<V> rows[GROUPS];
  V shift[GROUPS], c[GROUPS], power[GROUPS], own_z[GROUPS], rest[GROUPS];
  V common[GROUPS], own_grad[GROUPS];
  ColumnPlace<const char> from;  // of the group that is read
  // gradients on their way past the caches
  const char* drained = nullptr;
  char* drain_to = nullptr;
  int64_t waiting = 0;
  alignas(64) char turned[HELD * VEC_BYTES];
  V x[HELD];  // [groups][classes] logits, then derivatives, then gradients

  ColumnBatch(const RowLossArgs& args, int m)
      : a(args),
        mode(m),
        classes(int(args.classes)),
        stream(m != ROW_FORWARD && a.grad != a.x && a.grad_class_stride == 1 &&
               a.grad_row_stride == a.classes && a.inner == a.rows && classes >= SIZE &&
               a.rows * a.classes * dtype_bytes(D) >= BATCH_STREAM_BYTES),
        t(splat<V>(T(args.logit_scale))) {}

  // Groups that fit.
  int capacity() const { return HELD / classes < GROUPS ? HELD / classes : GROUPS; }

  // Where the gradient of later groups goes: their pages are found while there is other work.
  FLCORE_MEMBER void fetch_gradient(int g) const {
    const int64_t row = classes * dtype_bytes(D);
    const char* const to = static_cast<const char*>(a.grad) + first[g] * row + BATCH_AHEAD;
    for (int64_t i = 0; i < WIDTH * row; i += 1024) __builtin_prefetch(to + i, 1);
  }

  // Whether whole pieces of all rows can be read, and none has to be masked.
  FLCORE_MEMBER bool place(int g) {
    rows[g] = column_targets<V>(a, first[g], n[g]);
    place_rows(logits_of(a), first[g], n[g], WIDTH, from);
    const bool near = from.even && from.class_stride == 1;
    if (near && from.row_bytes <= 2 * classes * dtype_bytes(D))
      for (int64_t i = 0; i < WIDTH * from.row_bytes; i += 64)
        __builtin_prefetch(from.first + BATCH_AHEAD + i);
    if (stream) fetch_gradient(g);
    return near && classes >= SIZE && !any_lane(~rows[g].keep);
  }

  FLCORE_MEMBER void read(int g, bool direct) {
    V* const v = x + g * classes;
    const I keep = rows[g].keep;
    if (direct) {
      const EvenRows<const char> even(from.first, from.row_bytes);
      for (int k = 0; k < classes; k += SIZE)
        load_turned<D>(even, k + SIZE <= classes ? k : classes - SIZE,
                       v + (k + SIZE <= classes ? k : classes - SIZE));
    } else if (any_lane(keep)) {
      read_columns<D>(from, n[g], 0, classes, v);
      for (int k = 0; k < classes; ++k) v[k] = (V)((I)v[k] & keep);
    } else {
      for (int k = 0; k < classes; ++k) v[k] = V{};
    }
  }

  FLCORE_MEMBER void find_shift(int g) {
    if (mode == ROW_BACKWARD) {
      shift[g] = some_lanes<V>(a.shift, first[g], n[g], T(0));
    } else {
      const V* v = x + g * classes;
      V m = v[0] * t;
      for (int k = 1; k < classes; ++k) m = vmax(m, v[k] * t);
      shift[g] = m;
    }
    row_shift(shift[g], c[g], power[g]);
  }

  // R and z_y; the derivatives take the place of the logits. DIRECT: those are not read yet.
  template <bool DIRECT>
  FLCORE_MEMBER void sum(int g) {
    V* const v = x + g * classes;
    const I target = rows[g].target;
    const V less = MAP == ROW_SOFTMAX ? c[g] : V{}, by = MAP == ROW_SOFTMAX ? power[g] : V{};
    const EvenRows<const char> even(from.first, from.row_bytes);
    V part[4] = {}, own = {};
    const auto one = [&](int k, const V& value, V& partial) FLCORE_LAMBDA {
      const V z = value * t;
      V e, d;
      row_map<MAP>(z, less, by, e, d);
      const I here = target == N(k);
      partial += here ? V{} : e;
      own = here ? z : own;
      v[k] = d;
    };
    int k = 0;
    for (; k + 4 <= classes; k += 4) {
      V q[4];
      if constexpr (DIRECT) {
        load_turned<D>(even, k, q);
        if (SIZE == 2) load_turned<D>(even, k + 2, q + 2);
      } else {
        for (int i = 0; i < 4; ++i) q[i] = v[k + i];
      }
      unroll<4>([&](auto i) FLCORE_LAMBDA {
        one(k + decltype(i)::value, q[decltype(i)::value], part[decltype(i)::value]);
      });
    }
    while (DIRECT && k < classes) {  // the last piece may begin among those that are done
      const int start = k + SIZE <= classes ? k : classes - SIZE;
      V q[SIZE];
      load_turned<D>(even, start, q);
      for (int j = k - start; j < SIZE; ++j) one(start + j, q[j], part[(start + j) & 3]);
      k = start + SIZE;
    }
    for (; k < classes; ++k) one(k, v[k], part[k & 3]);
    rest[g] = (part[0] + part[1]) + (part[2] + part[3]);
    own_z[g] = own;
  }

  FLCORE_MEMBER void finish(int g) {
    const I keep = rows[g].keep;
    const auto kept = [&](V v) FLCORE_LAMBDA { return (V)((I)v & keep); };
    RowEndSums<V> s;
    V d, factor{};
    row_map<MAP>(own_z[g], c[g], power[g], s.own, d);
    s.own = rows[g].target >= 0 ? s.own : V{};
    s.rest = rest[g];
    s.shift = MAP == ROW_SOFTMAX ? shift[g] : V{};
    if (MAP == ROW_SOFTMAX) {
      factor = row_factor(shift[g], c[g], power[g]);
      s.rest *= factor;
      s.own *= factor;
    }
    if (mode == ROW_BACKWARD) {
      s.rest = some_lanes<V>(a.rest, first[g], n[g], T(0));
      s.own = some_lanes<V>(a.own, first[g], n[g], T(0));
    }
    s.log_own = own_z[g] - s.shift;  // softmax; row_gap_plain takes ln e_y for the others
    V scale = splat<V>(T(a.grad_scale));
    if (a.upstream) scale *= some_lanes<V>(a.upstream, first[g], n[g], T(0));
    scale *= t;
    const RowEndFactors<V> f =
        row_end_plain<MAP == ROW_SOFTMAX>(s, scale, mode != ROW_BACKWARD && a.loss);
    if (mode != ROW_BACKWARD) {
      put_lanes(a.loss, first[g], n[g], kept(f.loss));
      put_lanes(a.rest, first[g], n[g], kept(s.rest));
      put_lanes(a.own, first[g], n[g], kept(s.own));
      put_lanes(a.shift, first[g], n[g], kept(s.shift));
    }
    common[g] = kept(MAP == ROW_SOFTMAX ? f.common * factor : f.common);
    own_grad[g] = kept(-(f.own_rho * row_rho<MAP>(own_z[g])));
  }

  FLCORE_MEMBER void write(int g) {
    ColumnPlace<char> to;
    place_rows(gradient_of(a), first[g], n[g], WIDTH, to);
    if (!to.even || to.class_stride != 1 || classes < SIZE) {
      V* const v = x + g * classes;
      for (int k = 0; k < classes; ++k)
        v[k] = rows[g].target == N(k) ? own_grad[g] : common[g] * v[k];
      return write_columns<D>(to, n[g], 0, classes, v);
    }
    write_even(g, EvenRows<char>(to.first, to.row_bytes));
  }

  FLCORE_MEMBER void write_even(int g, const EvenRows<char>& even) {
    const V* const v = x + g * classes;
    const V by = common[g], own = own_grad[g];
    const I target = rows[g].target;
    for (int k = 0; k < classes; k += SIZE) {
      const int start = k + SIZE <= classes ? k : classes - SIZE;
      V q[SIZE];
      unroll<SIZE>([&](auto i) FLCORE_LAMBDA {
        const int at = start + decltype(i)::value;
        q[decltype(i)::value] = target == N(at) ? own : by * v[at];
      });
      store_turned<D>(even, WIDTH, start, q);
    }
  }

  // All groups by way of the first-level cache; false if they do not fill whole vectors of memory.
  FLCORE_MEMBER bool write_past_caches(int groups) {
    const int64_t row = classes * dtype_bytes(D), bytes = groups * WIDTH * row;
    char* const to = static_cast<char*>(a.grad) + first[0] * row;
    if (n[groups - 1] != WIDTH || bytes % VEC_BYTES != 0) return false;
    if (reinterpret_cast<uintptr_t>(to) % VEC_BYTES != 0) return false;
    drain(waiting);
    for (int g = 0; g < groups; ++g) write_even(g, EvenRows<char>(turned + g * WIDTH * row, row));
    drained = turned;
    drain_to = to;
    waiting = bytes;
    return true;
  }

  // Sends off some of what waits in `turned`: little by little, so that it takes no time.
  FLCORE_MEMBER void drain(int64_t most) {
    for (int64_t left = most < waiting ? most : waiting; left > 0; left -= VEC_BYTES) {
      stream_vector(drain_to, load<vf32>(drained));
      drained += VEC_BYTES;
      drain_to += VEC_BYTES;
      waiting -= VEC_BYTES;
    }
  }
  void finish_writing() {
    drain(waiting);
    if (stream) stream_end();
  }

  void run(int groups) {
    for (int g = 0; g < groups; ++g) {
      const bool direct = place(g);
      if (MAP != ROW_SOFTMAX && direct)
        sum<true>(g);
      else
        read(g, direct);
      if (MAP != ROW_SOFTMAX && !direct) sum<false>(g);
      if (stream) drain(classes * int64_t(VEC_BYTES));
    }
    if (MAP == ROW_SOFTMAX) {
      for (int g = 0; g < groups; ++g) find_shift(g);
      for (int g = 0; g < groups; ++g) sum<false>(g);
    }
    for (int g = 0; g < groups; ++g) finish(g);
    if (mode == ROW_FORWARD || (stream && write_past_caches(groups))) return;
    for (int g = 0; g < groups; ++g) write(g);
  }
};

}  // namespace
}  // namespace FLCORE_ISA
}  // namespace flcore
