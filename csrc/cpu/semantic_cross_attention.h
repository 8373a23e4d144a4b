// What the forward and the backward of semantic_cross_attention share: how the work is cut and where it is kept.
//
// One side's positions, in label order, are cut into chunks of fixed size; a chunk is walked label by label, in blocks
// of rows, against the tokens of that label on the other side (the columns). Where the columns are latents, each chunk
// keeps partial results for those it meets, merged afterwards in the order of the chunks. Nothing depends on the number
// of threads, so neither do the bits of the result.
#pragma once

#include "parallel.h"
#include "products.h"
#include "tokens.h"
#include "turned_tokens.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

constexpr int64_t kRowBlock = 32;
constexpr int64_t kColumnBlock = 64;

inline int64_t most_columns(const sca_tokens& tokens) {
  return are_latents(tokens) ? tokens.max_per_label : kColumnBlock;
}

// Positions in a chunk: enough that the partial results for latents stay small beside what they are made from.
inline int64_t chunk_size(const sca_semantic_cross_attention& call) {
  const int64_t most = larger(are_latents(call.key_tokens) ? call.key_tokens.max_per_label : 0,
                              are_latents(call.query_tokens) ? call.query_tokens.max_per_label : 0);
  return larger<int64_t>(256, 8 * most) / kRowBlock * kRowBlock;
}

inline int64_t chunk_count(const sca_semantic_cross_attention& call, const sca_tokens& tokens) {
  const int64_t size = chunk_size(call);
  return (tokens.count + size - 1) / size;
}

// A call whose tensors have adjacent channels, as far as they can be turned; those lie before the rest of the
// workspace.
template <typename Scalar>
class TurnedCall {
 public:
  explicit TurnedCall(const sca_semantic_cross_attention& given)
      : given_(given), call_(given), turned_(given.workspace, given.batch, given.heads, given.threads) {
    call_.query = turned_.operand(given.query, queries(), given.key_width);
    call_.key = turned_.operand(given.key, keys(), given.key_width);
    call_.value = turned_.operand(given.value, keys(), given.value_width);
  }

 protected:
  int64_t queries() const { return given_.query_tokens.count; }
  int64_t keys() const { return given_.key_tokens.count; }
  // After all that is turned.
  const sca_semantic_cross_attention& call() {
    if (given_.workspace) call_.workspace = static_cast<char*>(given_.workspace) + turned_.used();
    return call_;
  }

  const sca_semantic_cross_attention given_;
  sca_semantic_cross_attention call_;
  TurnedTokens<Scalar> turned_;
};

// The same call without memory: only its sizes can be asked for.
inline sca_semantic_cross_attention without_memory(sca_semantic_cross_attention call) {
  call.workspace = nullptr;
  return call;
}

// A block of rows: pointers to them, and memory for those that cannot be used where they lie.
template <typename T>
struct Block {
  T* memory;
  T** rows;

  Block(Arena& arena, int64_t count, int64_t width)
      : memory(arena.take<T>(count * width)), rows(arena.take<T*>(count)) {}
};

// What one thread works in. `first` is as wide as the keys, `second` as wide as the values.
template <typename T>
struct Scratch {
  Block<T> row_first, row_second, row_first_gradient, row_second_gradient, column_first, column_second;
  T** next_rows;     // the rows after the block in hand
  T** partial_rows;  // where the partial results of the columns are
  T* weights;        // (columns + 1, kRowBlock): the attention weights, and a column for the uniform term
  T* gradients;      // (columns, kRowBlock)

  Scratch(Arena& arena, int64_t columns, int64_t first_width, int64_t second_width)
      : row_first(arena, kRowBlock, first_width),
        row_second(arena, kRowBlock, second_width),
        row_first_gradient(arena, kRowBlock, first_width),
        row_second_gradient(arena, kRowBlock, second_width),
        column_first(arena, columns, first_width),
        column_second(arena, columns + 1, second_width),
        next_rows(arena.take<T*>(kRowBlock)),
        partial_rows(arena.take<T*>(columns)),
        weights(arena.take<T>((columns + 1) * kRowBlock)),
        gradients(arena.take<T>(columns * kRowBlock)) {}
};

// Partial results for the latents that the chunks of the other side's positions meet. In label order, from one pair of
// chunk and label to the next either the chunk or the label grows, so row chunk * max_per_label + (first latent of the
// label) is never shared by two pairs.
template <typename T>
struct Partials {
  int64_t rows_per_head;
  T *first, *second, *max, *sum;

  Partials(Arena& arena, const sca_semantic_cross_attention& call, int64_t first_width, int64_t second_width) {
    const sca_tokens& latents = are_latents(call.key_tokens) ? call.key_tokens : call.query_tokens;
    const sca_tokens& others = are_latents(call.key_tokens) ? call.query_tokens : call.key_tokens;
    rows_per_head = are_latents(latents) ? chunk_count(call, others) * latents.max_per_label + latents.count : 0;
    const int64_t rows = call.batch * call.heads * rows_per_head;
    first = arena.take<T>(rows * first_width);
    second = arena.take<T>(rows * second_width);
    max = arena.take<T>(rows);
    sum = arena.take<T>(rows);
  }
};

// One call: its sizes, its workspace, and the steps that forward and backward have in common.
template <typename Scalar>
class SemanticCrossAttention {
 public:
  using T = ComputeType<Scalar>;

  explicit SemanticCrossAttention(const sca_semantic_cross_attention& call)
      : call_(call),
        arena_(call.workspace),
        first_width_(padded<T>(call.key_width)),
        second_width_(padded<T>(call.value_width)),
        chunk_size_(sca::SCA_CPU_CAPABILITY::chunk_size(call)),
        partials_(arena_, call, first_width_, second_width_),
        uniform_(arena_.take<T>(call.batch * call.heads * second_width_)) {
    const int64_t most_chunks = larger(chunks(call.query_tokens), chunks(call.key_tokens));
    chunk_sums_ = arena_.take<T>(call.batch * call.heads * most_chunks * second_width_);
    delta_ = arena_.take<T>(are_latents(call.key_tokens) ? 0 : call.batch * call.heads * call.query_tokens.count);
    scratch_ = arena_.used();
  }

  int64_t workspace_size() const { return scratch_ + call_.threads * scratch_size(); }

 protected:
  struct Item {
    int64_t image, head, index;  // index: of a chunk or a label
  };
  Item split(int64_t item, int64_t per_head) const {
    return {item / per_head / call_.heads, item / per_head % call_.heads, item % per_head};
  }
  int64_t items(int64_t per_head) const { return call_.batch * call_.heads * per_head; }
  int64_t head_index(const Item& item) const { return item.image * call_.heads + item.head; }

  int64_t chunks(const sca_tokens& tokens) const { return chunk_count(call_, tokens); }
  Range chunk(const sca_tokens& tokens, int64_t index) const {
    return {index * chunk_size_, smaller((index + 1) * chunk_size_, tokens.count)};
  }
  Range chunks_of(Range positions) const {
    return {positions.begin / chunk_size_, (positions.end + chunk_size_ - 1) / chunk_size_};
  }

  // Runs visit(item, scratch) for every chunk of the tokens' positions, in every image and head.
  template <typename Visit>
  void each_chunk(const sca_tokens& tokens, const Visit& visit) const {
    const int64_t per_head = chunks(tokens);
    parallel_for(items(per_head), call_.threads, [&](int64_t index, int thread) {
      Scratch<T> memory = scratch(thread);
      visit(split(index, per_head), memory);
    });
  }

  Matrix<Scalar> matrix(const sca_tensor& tensor, const Item& item, int64_t width) const {
    return {static_cast<Scalar*>(tensor.data) + item.image * tensor.batch_stride + item.head * tensor.head_stride,
            tensor.token_stride, tensor.channel_stride, width};
  }

  Scratch<T> scratch(int thread) const {
    Arena arena(static_cast<char*>(call_.workspace) + scratch_ + thread * scratch_size());
    return make_scratch(arena);
  }

  T* partial(T* base, const Item& item, int64_t chunk_index, int64_t latent, int64_t width) const {
    const sca_tokens& latents = are_latents(call_.key_tokens) ? call_.key_tokens : call_.query_tokens;
    const int64_t row = head_index(item) * partials_.rows_per_head + chunk_index * latents.max_per_label + latent;
    return base + row * width;
  }
  T* chunk_sum(const Item& item, int64_t chunk_index, const sca_tokens& tokens) const {
    return chunk_sums_ + (head_index(item) * chunks(tokens) + chunk_index) * second_width_;
  }
  T* uniform(const Item& item) const { return uniform_ + head_index(item) * second_width_; }

  // Whether rows of a result are written past the caches: where it is larger than they are and its rows lie ready.
  bool streams(const Matrix<Scalar>& result, const ImageTokens& tokens) const {
    const int64_t bytes = items(tokens.count()) * result.width * int64_t{sizeof(Scalar)};
    return bytes >= kStreamedBytes && result.direct() && result.aligned();
  }

  // dots() of the rows at some positions of a matrix, while the rows after them are fetched if they lie ready for use.
  void dots_and_fetch(const Matrix<Scalar>& matrix, const ImageTokens& tokens, int64_t position, int64_t count,
                      T* const* rows, T* const* columns, int64_t column_count, int64_t width, T* table,
                      T** next_rows) const {
    const int64_t next = position + count;
    if (matrix.direct() && next + count <= tokens.count()) {
      matrix.locate(tokens.at(next), count, nullptr, next_rows);
      dots(rows, count, columns, column_count, width, table, kRowBlock,
           [&](int64_t r, int64_t i) { prefetch(next_rows[smaller(r, count - 1)] + i); });
    } else {
      dots(rows, count, columns, column_count, width, table, kRowBlock, FetchNothing{});
    }
  }

  // Adds the rows at some positions to `sum`.
  void add_rows(const Matrix<Scalar>& rows, const ImageTokens& tokens, Range positions, Block<T>& block, T* sum) const {
    const T one = 1;
    for (int64_t p = positions.begin; p < positions.end; p += kRowBlock) {
      const int64_t count = smaller(kRowBlock, positions.end - p);
      rows.gather(tokens.at(p), count, positions.end - p - count, block.memory, block.rows);
      weighted_sum(Write::kAccumulate, Weights<T>{&one, 0, 0}, block.rows, count, &sum, 1, second_width_);
    }
  }

  // uniform = the chunks' sums times a factor.
  void merge_chunk_sums(const sca_tokens& tokens, T factor) const {
    parallel_for(items(1), call_.threads, [&](int64_t index, int) {
      const Item item = split(index, 1);
      T* total = uniform(item);
      fill(total, second_width_);
      for (int64_t c = 0; c < chunks(tokens); ++c) add(chunk_sum(item, c, tokens), T(1), total, second_width_);
      scale(factor, total, second_width_);
    });
  }
  // Of each value in the mean of all.
  T share() const { return call_.key_tokens.count > 0 ? T(1) / static_cast<T>(call_.key_tokens.count) : T(0); }

  bool any_unmatched(const sca_tokens& tokens, const sca_tokens& others) const {
    for (int64_t image = 0; image < call_.batch; ++image) {
      if (ImageTokens(tokens, image).any_unmatched(ImageTokens(others, image))) return true;
    }
    return false;
  }

  static void fill(T* row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) row[i] = 0;
  }
  static void add(const T* row, T factor, T* __restrict sum, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += factor * row[i];
  }
  static void scale(T factor, T* row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) row[i] *= factor;
  }

  const sca_semantic_cross_attention& call_;
  Arena arena_;
  const int64_t first_width_, second_width_, chunk_size_;
  Partials<T> partials_;
  T *uniform_, *chunk_sums_, *delta_;

 private:
  Scratch<T> make_scratch(Arena& arena) const {
    const int64_t columns = larger(most_columns(call_.query_tokens), most_columns(call_.key_tokens));
    return Scratch<T>(arena, columns, first_width_, second_width_);
  }
  int64_t scratch_size() const {
    Arena counter(nullptr);
    make_scratch(counter);
    return counter.used();
  }

  int64_t scratch_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
