#include "semantic_cross_attention.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// With P = exp(scale * Q K^T - lse) over the pairs of equal label, dP = dO V^T, delta = rowsum(dO * O):
//     dS = scale * P * (dP - delta + dlse),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
// P and dS are made anew, block by block, from what was saved. A query without keys sends dO / keys to every value, or
// dO to what was given in the place of their mean.
// delta also is rowsum(P * dP): so it is made where the keys are latents, all in one block, and where the output was
// rounded to 16 bits, whose error it would carry.
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
    spread_ = unmatched && call_.empty_uniform && !call_.empty_value && wanted(keys_.second_gradient);
    if (spread_ || gradients_.grad_empty_value) {
      Base::each_chunk(queries_.tokens, [&](const Item& item, Scratch<T>& scratch) { sum_unmatched(item, scratch); });
      Base::merge_chunk_sums(queries_.tokens, spread_ ? Base::share() : T(1));
    }
    if (gradients_.grad_empty_value) copy_to_empty_values();
    if (!latent_keys && !kRounded) {
      Base::each_chunk(queries_.tokens, [&](const Item& item, Scratch<T>& scratch) { find_delta(item, scratch); });
    }
    if (!latent_keys && latent_queries && kRounded) {
      const int64_t labels = queries_.tokens.labels;
      Base::each_chunk(keys_.tokens, [&](const Item& item, Scratch<T>& scratch) { sum_delta(item, scratch); });
      parallel_for(Base::items(labels), call_.threads,
                   [&](int64_t index, int) { merge_delta(Base::split(index, labels)); });
    }

    const bool keys_wanted = wanted(keys_.first_gradient) || wanted(keys_.second_gradient);
    const bool by_query = latent_keys || (!latent_queries && (wanted(queries_.first_gradient) || kRounded));
    const bool by_key = !latent_keys && (latent_queries || keys_wanted);
    if (by_query) pass<true>(queries_, keys_);
    if (by_key) pass<false>(keys_, queries_);
  }

 private:
  struct Side {
    const sca_tokens& tokens;
    sca_tensor first, second, first_gradient, second_gradient;
  };

  static constexpr bool kRounded = !std::is_same_v<Scalar, T>;

  static bool wanted(const sca_tensor& gradient) { return gradient.data != nullptr; }

  const T* lse(const Item& item) const { return at_query(static_cast<const T*>(call_.lse), item); }
  const T* grad_lse(const Item& item) const { return at_query(static_cast<const T*>(gradients_.grad_lse), item); }
  T* delta(const Item& item) const { return Base::delta_ + Base::head_index(item) * queries_.tokens.count; }
  const T* at_query(const T* base, const Item& item) const {
    return base ? base + Base::head_index(item) * queries_.tokens.count : nullptr;
  }

  // The sum of dO over a chunk's queries without keys.
  void sum_unmatched(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(queries_.tokens, item.image), keys(keys_.tokens, item.image);
    const Matrix<Scalar> grad_out = Base::matrix(queries_.second, item, call_.value_width);
    T* sum = Base::chunk_sum(item, item.index, queries_.tokens);
    Base::fill(sum, second_width_);
    queries.for_each_label(Base::chunk(queries_.tokens, item.index), [&](int64_t label, Range rows) {
      if (keys.with_label(label).size() == 0) Base::add_rows(grad_out, queries, rows, scratch.row_second, sum);
    });
  }

  void copy_to_empty_values() const {
    for (int64_t index = 0; index < Base::items(1); ++index) {
      T* target = static_cast<T*>(gradients_.grad_empty_value) + index * call_.value_width;
      Base::fill(target, call_.value_width);
      Base::add(Base::uniform(Base::split(index, 1)), T(1), target, call_.value_width);
    }
  }

  // delta = rowsum(dO * O)
  void find_delta(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(queries_.tokens, item.image);
    const Matrix<Scalar> grad_out = Base::matrix(queries_.second, item, call_.value_width);
    const Matrix<Scalar> out = Base::matrix(call_.out, item, call_.value_width);
    const Range rows = Base::chunk(queries_.tokens, item.index);
    Block<T>&left = scratch.row_second, &right = scratch.row_second_gradient;
    for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
      const int64_t count = smaller(kRowBlock, rows.end - p), following = queries.count() - p - count;
      const Positions tokens = queries.at(p);
      grad_out.gather(tokens, count, following, left.memory, left.rows);
      out.gather(tokens, count, following, right.memory, right.rows);
      for (int64_t r = 0; r < count; ++r) delta(item)[tokens[r]] = dot(left.rows[r], right.rows[r]);
    }
  }

  // The part of delta = rowsum(P * dP) of latent queries that a chunk of their pixel keys makes.
  void sum_delta(const Item& item, Scratch<T>& scratch) const {
    const Operands operands(*this, item, keys_, queries_);
    operands.row_tokens.for_each_label(Base::chunk(keys_.tokens, item.index), [&](int64_t label, Range rows) {
      const Range columns = operands.column_tokens.with_label(label);
      if (columns.size() == 0) return;
      operands.gather_columns(columns.begin, columns.size(), scratch);
      T* sums = Base::partial(Base::partials_.sum, item, item.index, columns.begin, 1);
      Base::fill(sums, columns.size());
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        operands.gather_rows(p, count, scratch);
        weigh<false>(item, scratch, operands, p, count, columns.begin, columns.size());
        for (int64_t c = 0; c < columns.size(); ++c) {
          const T *weights = scratch.weights + c * kRowBlock, *products = scratch.gradients + c * kRowBlock;
          for (int64_t r = 0; r < count; ++r) sums[c] += weights[r] * products[r];
        }
      }
    });
  }

  // delta of one label's latent queries from the parts of the chunks, in their order.
  void merge_delta(const Item& item) const {
    const Range latents = ImageTokens(queries_.tokens, item.image).with_label(item.index);
    const Range pixels = ImageTokens(keys_.tokens, item.image).with_label(item.index);
    const Range chunks = pixels.size() > 0 ? Base::chunks_of(pixels) : Range{0, 0};
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      T sum = 0;
      for (int64_t c = chunks.begin; c < chunks.end; ++c) {
        sum += *Base::partial(Base::partials_.sum, item, c, latent, 1);
      }
      delta(item)[latent] = sum;
    }
  }

  T dot(const T* a, const T* b) const {
    Vector<T> sum = {};
    for (int64_t i = 0; i < second_width_; i += kLanes<T>) sum += load(a + i) * load(b + i);
    return sum_lanes<T>(sum);
  }

  // The four matrices of a pass, for one image and head.
  struct Operands {
    ImageTokens row_tokens, column_tokens;
    Matrix<Scalar> row_first, row_second, column_first, column_second;

    Operands(const Backward& backward, const Item& item, const Side& rows, const Side& columns)
        : row_tokens(rows.tokens, item.image),
          column_tokens(columns.tokens, item.image),
          row_first(backward.matrix(rows.first, item, backward.call_.key_width)),
          row_second(backward.matrix(rows.second, item, backward.call_.value_width)),
          column_first(backward.matrix(columns.first, item, backward.call_.key_width)),
          column_second(backward.matrix(columns.second, item, backward.call_.value_width)) {}

    void gather_rows(int64_t position, int64_t count, Scratch<T>& scratch) const {
      const Positions tokens = row_tokens.at(position);
      const int64_t following = row_tokens.count() - position - count;
      row_first.gather(tokens, count, following, scratch.row_first.memory, scratch.row_first.rows);
      row_second.gather(tokens, count, following, scratch.row_second.memory, scratch.row_second.rows);
    }
    void gather_columns(int64_t position, int64_t count, Scratch<T>& scratch) const {
      const Positions tokens = column_tokens.at(position);
      column_first.gather(tokens, count, 0, scratch.column_first.memory, scratch.column_first.rows);
      column_second.gather(tokens, count, 0, scratch.column_second.memory, scratch.column_second.rows);
    }
  };

  template <bool kRowsAreQueries>
  void pass(const Side& rows, const Side& columns) const {
    Base::each_chunk(rows.tokens, [&](const Item& item, Scratch<T>& scratch) {
      differentiate_chunk<kRowsAreQueries>(item, scratch, rows, columns);
    });
    if (!are_latents(columns.tokens)) return;
    const int64_t groups = columns.tokens.labels + 1;
    parallel_for(Base::items(groups), call_.threads, [&](int64_t index, int thread) {
      Scratch<T> scratch = Base::scratch(thread);
      merge_label(Base::split(index, groups), scratch, rows, columns);
    });
  }

  template <bool kRowsAreQueries>
  void differentiate_chunk(const Item& item, Scratch<T>& scratch, const Side& row_side, const Side& column_side) const {
    const Operands operands(*this, item, row_side, column_side);
    const Matrix<Scalar> first_gradient = Base::matrix(row_side.first_gradient, item, call_.key_width);
    const Matrix<Scalar> second_gradient = Base::matrix(row_side.second_gradient, item, call_.value_width);
    const bool first_streamed = Base::streams(first_gradient, operands.row_tokens);
    const bool second_streamed = Base::streams(second_gradient, operands.row_tokens);
    const bool latent_columns = are_latents(column_side.tokens);
    const int64_t block = larger<int64_t>(most_columns(column_side.tokens), 1);
    Block<T>&first_target = scratch.row_first_gradient, &second_target = scratch.row_second_gradient;

    operands.row_tokens.for_each_label(Base::chunk(row_side.tokens, item.index), [&](int64_t label, Range rows) {
      const Range columns = operands.column_tokens.with_label(label);
      const bool one_block = columns.size() <= block;
      if (one_block) operands.gather_columns(columns.begin, columns.size(), scratch);
      if (latent_columns) clear_partials(item, columns, column_side);
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        const Positions tokens = operands.row_tokens.at(p);
        operands.gather_rows(p, count, scratch);
        first_gradient.locate(tokens, count, first_target.memory, first_target.rows);
        second_gradient.locate(tokens, count, second_target.memory, second_target.rows);
        if (kRowsAreQueries && !latent_columns && kRounded) {
          find_delta_of_rows(item, scratch, operands, p, count, columns);
        }
        int64_t c = columns.begin;
        do {  // once even without columns, which writes what such rows get
          const int64_t column_count = smaller(block, columns.end - c);
          if (!one_block) operands.gather_columns(c, column_count, scratch);
          weigh<kRowsAreQueries>(item, scratch, operands, p, count, c, column_count);
          differentiate_logits<kRowsAreQueries>(item, scratch, tokens, count, operands.column_tokens.at(c),
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

  // scratch.weights = P and scratch.gradients = dP, both [column][row].
  template <bool kRowsAreQueries>
  void weigh(const Item& item, Scratch<T>& scratch, const Operands& operands, int64_t row_position, int64_t row_count,
             int64_t column_position, int64_t column_count) const {
    Base::dots_and_fetch(operands.row_first, operands.row_tokens, row_position, row_count, scratch.row_first.rows,
                         scratch.column_first.rows, column_count, first_width_, scratch.weights, scratch.next_rows);
    Base::dots_and_fetch(operands.row_second, operands.row_tokens, row_position, row_count, scratch.row_second.rows,
                         scratch.column_second.rows, column_count, second_width_, scratch.gradients, scratch.next_rows);
    const T scale = static_cast<T>(call_.scale);
    alignas(kVectorBytes) T row_lse[kRowBlock];
    if constexpr (kRowsAreQueries) {
      const Positions rows = operands.row_tokens.at(row_position);
      for (int64_t r = 0; r < kRowBlock; ++r) row_lse[r] = lse(item)[rows[smaller(r, row_count - 1)]];
    }
    const Positions columns = operands.column_tokens.at(column_position);
    for (int64_t c = 0; c < column_count; ++c) {
      const T column_lse = kRowsAreQueries ? T(0) : lse(item)[columns[c]];
      for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
        const Vector<T> shift = kRowsAreQueries ? load(row_lse + r) : broadcast<T>(column_lse);
        T* weights = scratch.weights + c * kRowBlock + r;
        store<T>(weights, exp<T>(load(weights) * scale - shift));
      }
    }
  }

  // dP becomes dS.
  template <bool kRowsAreQueries>
  void differentiate_logits(const Item& item, Scratch<T>& scratch, Positions rows, int64_t row_count, Positions columns,
                            int64_t column_count) const {
    const bool latent_keys = are_latents(keys_.tokens);
    const auto shift = [&](int64_t query, T query_delta) {
      return query_delta - (gradients_.grad_lse ? grad_lse(item)[query] : T(0));
    };
    alignas(kVectorBytes) T row_shift[kRowBlock];
    if constexpr (kRowsAreQueries) {
      if (latent_keys) sum_rows_of_products(scratch, column_count, row_shift);
      for (int64_t r = 0; r < kRowBlock; ++r) {
        const int64_t query = rows[smaller(r, row_count - 1)];
        row_shift[r] = shift(query, latent_keys ? row_shift[r] : delta(item)[query]);
      }
    }
    const T scale = static_cast<T>(call_.scale);
    for (int64_t c = 0; c < column_count; ++c) {
      const T column_shift = kRowsAreQueries ? T(0) : shift(columns[c], delta(item)[columns[c]]);
      for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
        const Vector<T> total = kRowsAreQueries ? load(row_shift + r) : broadcast<T>(column_shift);
        T* gradients = scratch.gradients + c * kRowBlock + r;
        store<T>(gradients, load(scratch.weights + c * kRowBlock + r) * (load(gradients) - total) * scale);
      }
    }
  }

  // sums[r] = sum_c P * dP
  static void sum_rows_of_products(const Scratch<T>& scratch, int64_t column_count, T* sums) {
    for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
      Vector<T> sum = {};
      for (int64_t c = 0; c < column_count; ++c) {
        sum += load(scratch.weights + c * kRowBlock + r) * load(scratch.gradients + c * kRowBlock + r);
      }
      store<T>(sums + r, sum);
    }
  }

  // delta = rowsum(P * dP) of a block of queries over pixel keys, which come block by block.
  void find_delta_of_rows(const Item& item, Scratch<T>& scratch, const Operands& operands, int64_t position,
                          int64_t count, Range columns) const {
    T total[kRowBlock] = {};
    for (int64_t c = columns.begin; c < columns.end; c += kColumnBlock) {
      const int64_t column_count = smaller(kColumnBlock, columns.end - c);
      operands.gather_columns(c, column_count, scratch);
      weigh<true>(item, scratch, operands, position, count, c, column_count);
      alignas(kVectorBytes) T sums[kRowBlock];
      sum_rows_of_products(scratch, column_count, sums);
      for (int64_t r = 0; r < kRowBlock; ++r) total[r] += sums[r];
    }
    const Positions tokens = operands.row_tokens.at(position);
    for (int64_t r = 0; r < count; ++r) delta(item)[tokens[r]] = total[r];
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

  // The gradients of one label's latents, or of those without a label, from the partial results of the chunks, in their
  // order.
  void merge_label(const Item& item, Scratch<T>& scratch, const Side& row_side, const Side& column_side) const {
    const ImageTokens row_tokens(row_side.tokens, item.image), latent_tokens(column_side.tokens, item.image);
    const Range latents = latent_tokens.in_group(item.index);
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

template <typename Scalar>
class TurnedBackward : public TurnedCall<Scalar> {
  using Base = TurnedCall<Scalar>;
  using Base::call_;
  using Base::given_;
  using Base::turned_;

 public:
  // The workspace has room for gradients that lie in memory as their tensors do, that of the output as the query does;
  // others stay as they are.
  TurnedBackward(const sca_semantic_cross_attention& given, const sca_semantic_cross_attention_gradients& gradients)
      : Base(given), given_gradients_(gradients), gradients_(gradients) {
    if (!are_latents(given.key_tokens)) call_.out = turned_.operand(given.out, Base::queries(), given.value_width);
    if (turned_.turns(given.query, Base::queries(), given.value_width)) {
      gradients_.grad_out = turned_.operand(gradients.grad_out, Base::queries(), given.value_width);
    }
    each_gradient(
        [&](const sca_tensor& tensor, const sca_tensor& gradient, sca_tensor& turned, int64_t tokens, int64_t width) {
          if (turned_.turns(tensor, tokens, width)) turned = turned_.result(gradient, tokens, width);
        });
  }

  int64_t workspace_size() { return turned_.used() + SemanticCrossAttention<Scalar>(Base::call()).workspace_size(); }
  void run() {
    Backward<Scalar>(Base::call(), gradients_).run();
    each_gradient([&](const sca_tensor&, const sca_tensor& gradient, const sca_tensor& turned, int64_t tokens,
                      int64_t width) { turned_.write(turned, gradient, tokens, width); });
  }

 private:
  template <typename Visit>
  void each_gradient(const Visit& visit) {
    visit(given_.query, given_gradients_.grad_query, gradients_.grad_query, Base::queries(), given_.key_width);
    visit(given_.key, given_gradients_.grad_key, gradients_.grad_key, Base::keys(), given_.key_width);
    visit(given_.value, given_gradients_.grad_value, gradients_.grad_value, Base::keys(), given_.value_width);
  }

  const sca_semantic_cross_attention_gradients given_gradients_;
  sca_semantic_cross_attention_gradients gradients_;
};

}  // namespace

int64_t semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention& call) {
  const sca_semantic_cross_attention_gradients gradients{call.query, nullptr,    call.query,
                                                         call.key,   call.value, nullptr};
  int64_t size = 0;
  with_scalar_type(call.scalar_type, [&](auto scalar) {
    size = TurnedBackward<decltype(scalar)>(without_memory(call), gradients).workspace_size();
  });
  return size;
}

void semantic_cross_attention_backward(const sca_semantic_cross_attention& call,
                                       const sca_semantic_cross_attention_gradients& gradients) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { TurnedBackward<decltype(scalar)>(call, gradients).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
