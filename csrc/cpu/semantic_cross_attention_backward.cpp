#include "semantic_cross_attention.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// With P = exp(scale * Q K^T - lse) over the pairs of equal label, dP = dO V^T, delta = rowsum(dO * O):
//     dS = scale * P * (dP - delta + dlse),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
// P and dS are made anew, block by block, from what was saved. A query without keys sends dO / keys to every value.
//
// Both sides look alike: rows `first` (query or key) are multiplied for P and rows `second` (grad_out or value) for dP.
// A pass takes one side as rows, whose gradients it completes, and the other as columns; columns that are latents get
// their gradients in the same pass through partial results.
template <typename Scalar>
class Backward : public SemanticCrossAttention<Scalar> {
  using Base = SemanticCrossAttention<Scalar>;
  using typename Base::Item;
  using typename Base::T;
  using Base::call_;
  using Base::first_width_;
  using Base::second_width_;

 public:
  Backward(const sca_semantic_cross_attention& call, const sca_semantic_cross_attention_gradients& gradients)
      : Base(call),
        gradients_(gradients),
        queries_{call.query_tokens, call.query, gradients.grad_out, gradients.grad_query, {}},
        keys_{call.key_tokens, call.key, call.value, gradients.grad_key, gradients.grad_value} {}

  void run() {
    const bool latent_keys = are_latents(keys_.tokens), latent_queries = are_latents(queries_.tokens);
    const bool unmatched = Base::any_unmatched(queries_.tokens, keys_.tokens);
    spread_ = unmatched && call_.empty_uniform && wanted(keys_.second_gradient);
    if (spread_ || !latent_keys) {
      Base::each_chunk(queries_.tokens, [&](const Item& item, Scratch<T>& scratch) { prepare_chunk(item, scratch); });
    }
    if (spread_) Base::merge_chunk_sums(queries_.tokens);

    const bool keys_wanted = wanted(keys_.first_gradient) || wanted(keys_.second_gradient);
    const bool by_query = latent_keys || (!latent_queries && wanted(queries_.first_gradient));
    const bool by_key = !latent_keys && (latent_queries || keys_wanted);
    if (by_query) pass<true>(queries_, keys_);
    if (by_key) pass<false>(keys_, queries_);
  }

 private:
  struct Side {
    const sca_tokens& tokens;
    sca_tensor first, second, first_gradient, second_gradient;
  };

  static bool wanted(const sca_tensor& gradient) { return gradient.data != nullptr; }

  const T* lse(const Item& item) const { return at_query(static_cast<const T*>(call_.lse), item); }
  const T* grad_lse(const Item& item) const { return at_query(static_cast<const T*>(gradients_.grad_lse), item); }
  T* delta(const Item& item) const { return Base::delta_ + Base::head_index(item) * queries_.tokens.count; }
  const T* at_query(const T* base, const Item& item) const {
    return base ? base + Base::head_index(item) * queries_.tokens.count : nullptr;
  }

  // What the passes need to know of all queries: delta, and the sum of dO over those without keys.
  void prepare_chunk(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(queries_.tokens, item.image), keys(keys_.tokens, item.image);
    const Matrix<Scalar> grad_out = Base::matrix(queries_.second, item, call_.value_width);
    const Matrix<Scalar> out = Base::matrix(call_.out, item, call_.value_width);
    T* sum = Base::chunk_sum(item, item.index, queries_.tokens);
    Base::fill(sum, second_width_);
    queries.for_each_label(Base::chunk(queries_.tokens, item.index), [&](int64_t label, Range rows) {
      if (keys.with_label(label).size() == 0) {
        if (spread_) Base::add_rows(grad_out, queries, rows, scratch.row_second, sum);
        return;
      }
      if (are_latents(keys_.tokens)) return;
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        const Positions tokens = queries.at(p);
        Block<T>&left = scratch.row_second, &right = scratch.row_second_gradient;
        grad_out.gather(tokens, count, 0, left.memory, left.rows);
        out.gather(tokens, count, 0, right.memory, right.rows);
        for (int64_t r = 0; r < count; ++r) delta(item)[tokens[r]] = dot(left.rows[r], right.rows[r]);
      }
    });
  }

  T dot(const T* a, const T* b) const {
    Vector<T> sum = {};
    for (int64_t i = 0; i < second_width_; i += kLanes<T>) sum += load(a + i) * load(b + i);
    return sum_lanes<T>(sum);
  }

  template <bool kRowsAreQueries>
  void pass(const Side& rows, const Side& columns) const {
    Base::each_chunk(rows.tokens, [&](const Item& item, Scratch<T>& scratch) {
      differentiate_chunk<kRowsAreQueries>(item, scratch, rows, columns);
    });
    if (!are_latents(columns.tokens)) return;
    parallel_for(Base::items(columns.tokens.labels), call_.threads, [&](int64_t index, int thread) {
      Scratch<T> scratch = Base::scratch(thread);
      merge_label(Base::split(index, columns.tokens.labels), scratch, rows, columns);
    });
  }

  template <bool kRowsAreQueries>
  void differentiate_chunk(const Item& item, Scratch<T>& scratch, const Side& row_side, const Side& column_side) const {
    const ImageTokens row_tokens(row_side.tokens, item.image), column_tokens(column_side.tokens, item.image);
    const Matrix<Scalar> row_first = Base::matrix(row_side.first, item, call_.key_width);
    const Matrix<Scalar> row_second = Base::matrix(row_side.second, item, call_.value_width);
    const Matrix<Scalar> column_first = Base::matrix(column_side.first, item, call_.key_width);
    const Matrix<Scalar> column_second = Base::matrix(column_side.second, item, call_.value_width);
    const Matrix<Scalar> first_gradient = Base::matrix(row_side.first_gradient, item, call_.key_width);
    const Matrix<Scalar> second_gradient = Base::matrix(row_side.second_gradient, item, call_.value_width);
    const bool first_streamed = Base::streams(first_gradient, row_tokens);
    const bool second_streamed = Base::streams(second_gradient, row_tokens);
    const bool latent_columns = are_latents(column_side.tokens);
    const int64_t block = larger<int64_t>(most_columns(column_side.tokens), 1);
    Block<T>&first_target = scratch.row_first_gradient, &second_target = scratch.row_second_gradient;

    row_tokens.for_each_label(Base::chunk(row_side.tokens, item.index), [&](int64_t label, Range rows) {
      const Range columns = column_tokens.with_label(label);
      const auto gather_columns = [&](int64_t begin, int64_t count) {
        const Positions tokens = column_tokens.at(begin);
        column_first.gather(tokens, count, 0, scratch.column_first.memory, scratch.column_first.rows);
        column_second.gather(tokens, count, 0, scratch.column_second.memory, scratch.column_second.rows);
      };
      const bool one_block = columns.size() <= block;
      if (one_block) gather_columns(columns.begin, columns.size());
      if (latent_columns) clear_partials(item, columns, column_side);
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        const int64_t following = row_tokens.count() - p - count;
        const Positions tokens = row_tokens.at(p);
        row_first.gather(tokens, count, following, scratch.row_first.memory, scratch.row_first.rows);
        row_second.gather(tokens, count, following, scratch.row_second.memory, scratch.row_second.rows);
        first_gradient.locate(tokens, count, first_target.memory, first_target.rows);
        second_gradient.locate(tokens, count, second_target.memory, second_target.rows);
        int64_t c = columns.begin;
        do {  // once even without columns, which writes what such rows get
          const int64_t column_count = smaller(block, columns.end - c);
          if (!one_block) gather_columns(c, column_count);
          make_tables<kRowsAreQueries>(item, scratch, row_first, row_second, row_tokens, p, count, column_tokens.at(c),
                                       column_count);
          const bool first_block = c == columns.begin;
          const auto write = [&](bool streamed) {
            if (!first_block) return Write::kAccumulate;
            return streamed && one_block ? Write::kStream : Write::kReplace;
          };
          if (wanted(row_side.first_gradient)) {
            weighted_sum(write(first_streamed), Weights<T>{scratch.gradients, 1, kRowBlock}, scratch.column_first.rows,
                         column_count, first_target.rows, count, first_width_);
          }
          if (wanted(row_side.second_gradient)) {
            const bool spread = first_block && spread_;
            if (spread) {  // the share of the queries without keys, as one more column of weight one
              scratch.column_second.rows[column_count] = Base::uniform(item);
              for (int64_t r = 0; r < kRowBlock; ++r) scratch.weights[column_count * kRowBlock + r] = 1;
            }
            weighted_sum(write(second_streamed), Weights<T>{scratch.weights, 1, kRowBlock}, scratch.column_second.rows,
                         column_count + spread, second_target.rows, count, second_width_);
          }
          c += block;
        } while (c < columns.end);
        if (latent_columns) add_partials(item, scratch, count, columns, column_side);
        if (wanted(row_side.first_gradient)) first_gradient.scatter(tokens, count, first_target.memory);
        if (wanted(row_side.second_gradient)) second_gradient.scatter(tokens, count, second_target.memory);
      }
    });
    if (first_streamed || second_streamed) stream_fence();
  }

  // scratch.weights = P and scratch.gradients = dS, both [column][row].
  template <bool kRowsAreQueries>
  void make_tables(const Item& item, Scratch<T>& scratch, const Matrix<Scalar>& row_first,
                   const Matrix<Scalar>& row_second, const ImageTokens& row_tokens, int64_t p, int64_t row_count,
                   Positions columns, int64_t column_count) const {
    const Positions rows = row_tokens.at(p);
    Base::dots_and_fetch(row_first, row_tokens, p, row_count, scratch.row_first.rows, scratch.column_first.rows,
                         column_count, first_width_, scratch.weights, scratch.next_rows);
    Base::dots_and_fetch(row_second, row_tokens, p, row_count, scratch.row_second.rows, scratch.column_second.rows,
                         column_count, second_width_, scratch.gradients, scratch.next_rows);
    const bool saved_delta = !are_latents(keys_.tokens);
    const T scale = static_cast<T>(call_.scale);
    const auto shift = [&](int64_t query) {  // what is subtracted from dP, but for a delta that is not known yet
      return (saved_delta ? delta(item)[query] : T(0)) - (gradients_.grad_lse ? grad_lse(item)[query] : T(0));
    };
    if constexpr (kRowsAreQueries) {
      alignas(kVectorBytes) T row_lse[kRowBlock], row_shift[kRowBlock];
      for (int64_t r = 0; r < kRowBlock; ++r) {
        const int64_t query = rows[smaller(r, row_count - 1)];
        row_lse[r] = lse(item)[query];
        row_shift[r] = shift(query);
      }
      for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
        Vector<T> row_delta = {};
        for (int64_t c = 0; c < column_count; ++c) {
          T* weights = scratch.weights + c * kRowBlock + r;
          store(weights, exp<T>(load(weights) * scale - load(row_lse + r)));
          row_delta += load(weights) * load(scratch.gradients + c * kRowBlock + r);
        }
        const Vector<T> total_shift = load(row_shift + r) + (saved_delta ? Vector<T>{} : row_delta);
        for (int64_t c = 0; c < column_count; ++c) {
          T* gradients = scratch.gradients + c * kRowBlock + r;
          store(gradients, load(scratch.weights + c * kRowBlock + r) * (load(gradients) - total_shift) * scale);
        }
      }
    } else {
      for (int64_t c = 0; c < column_count; ++c) {
        const T column_lse = lse(item)[columns[c]], column_shift = shift(columns[c]);
        for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
          T *weights = scratch.weights + c * kRowBlock + r, *gradients = scratch.gradients + c * kRowBlock + r;
          store(weights, exp<T>(load(weights) * scale - column_lse));
          store(gradients, load(weights) * (load(gradients) - column_shift) * scale);
        }
      }
    }
  }

  void clear_partials(const Item& item, Range latents, const Side& side) const {
    const int64_t count = latents.size();
    if (wanted(side.first_gradient)) {
      Base::fill(Base::partial(Base::partials_.first, item, item.index, latents.begin, first_width_),
                 count * first_width_);
    }
    if (wanted(side.second_gradient)) {
      Base::fill(Base::partial(Base::partials_.second, item, item.index, latents.begin, second_width_),
                 count * second_width_);
    }
  }

  void add_partials(const Item& item, Scratch<T>& scratch, int64_t row_count, Range latents, const Side& side) const {
    const auto add = [&](T* partials, const T* table, T* const* rows, int64_t width, T** targets) {
      for (int64_t i = 0; i < latents.size(); ++i) {
        targets[i] = Base::partial(partials, item, item.index, latents.begin + i, width);
      }
      weighted_sum(Write::kAccumulate, Weights<T>{table, kRowBlock, 1}, rows, row_count, targets, latents.size(),
                   width);
    };
    if (wanted(side.first_gradient)) {
      add(Base::partials_.first, scratch.gradients, scratch.row_first.rows, first_width_, scratch.partial_rows);
    }
    if (wanted(side.second_gradient)) {
      add(Base::partials_.second, scratch.weights, scratch.row_second.rows, second_width_, scratch.partial_rows);
    }
  }

  // The gradients of one label's latents from the partial results of the chunks, in their order.
  void merge_label(const Item& item, Scratch<T>& scratch, const Side& row_side, const Side& column_side) const {
    const ImageTokens row_tokens(row_side.tokens, item.image), latent_tokens(column_side.tokens, item.image);
    const Range latents = latent_tokens.with_label(item.index);
    const Range rows = row_tokens.with_label(item.index);
    const Range chunks = rows.size() > 0 ? Base::chunks_of(rows) : Range{0, 0};
    const auto merge = [&](const sca_tensor& gradient, T* partials, int64_t width, const T* more, Block<T>& block) {
      const Matrix<Scalar> target = Base::matrix(gradient, item, width);
      const int64_t stride = padded<T>(width);
      for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
        target.locate(latent_tokens.at(latent), 1, block.memory, block.rows);
        Base::fill(block.rows[0], stride);
        if (more) Base::add(more, T(1), block.rows[0], stride);
        for (int64_t c = chunks.begin; c < chunks.end; ++c) {
          Base::add(Base::partial(partials, item, c, latent, stride), T(1), block.rows[0], stride);
        }
        target.scatter(latent_tokens.at(latent), 1, block.memory);
      }
    };
    if (wanted(column_side.first_gradient)) {
      merge(column_side.first_gradient, Base::partials_.first, call_.key_width, nullptr, scratch.row_first);
    }
    if (wanted(column_side.second_gradient)) {
      merge(column_side.second_gradient, Base::partials_.second, call_.value_width,
            spread_ ? Base::uniform(item) : nullptr, scratch.row_second);
    }
  }

  const sca_semantic_cross_attention_gradients& gradients_;
  const Side queries_, keys_;
  bool spread_ = false;  // whether values get a share of the gradients of queries without keys
};

}  // namespace

void semantic_cross_attention_backward(const sca_semantic_cross_attention& call,
                                       const sca_semantic_cross_attention_gradients& gradients) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Backward<decltype(scalar)>(call, gradients).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
