#include <cmath>

#include "semantic_cross_attention.h"
#include "softmax.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class Forward : public SemanticCrossAttention<Scalar> {
  using Base = SemanticCrossAttention<Scalar>;
  using typename Base::Item;
  using typename Base::T;
  using Base::call_;
  using Base::first_width_;
  using Base::second_width_;

 public:
  using Base::Base;

  void run() const {
    const sca_tokens &queries = call_.query_tokens, &keys = call_.key_tokens;
    const bool by_key = are_latents(queries) && !are_latents(keys);
    if (call_.empty_value) {
      copy_empty_values();
    } else if (call_.empty_uniform && Base::any_unmatched(queries, keys)) {
      Base::each_chunk(keys, [&](const Item& item, Scratch<T>& scratch) { sum_values(item, scratch); });
      Base::merge_chunk_sums(keys, Base::share());
    }
    if (by_key) {
      Base::each_chunk(keys, [&](const Item& item, Scratch<T>& scratch) { pool_chunk(item, scratch); });
      const int64_t groups = queries.labels + 1;
      parallel_for(Base::items(groups), call_.threads, [&](int64_t index, int thread) {
        Scratch<T> scratch = Base::scratch(thread);
        merge_label(Base::split(index, groups), scratch);
      });
    } else {
      Base::each_chunk(queries, [&](const Item& item, Scratch<T>& scratch) { attend_chunk(item, scratch); });
    }
  }

 private:
  T* lse(const Item& item) const {
    return static_cast<T*>(call_.lse) + Base::head_index(item) * call_.query_tokens.count;
  }

  void sum_values(const Item& item, Scratch<T>& scratch) const {
    T* sum = Base::chunk_sum(item, item.index, call_.key_tokens);
    Base::fill(sum, second_width_);
    Base::add_rows(Base::matrix(call_.value, item, call_.value_width), ImageTokens(call_.key_tokens, item.image),
                   Base::chunk(call_.key_tokens, item.index), scratch.row_second, sum);
  }

  void copy_empty_values() const {
    for (int64_t index = 0; index < Base::items(1); ++index) {
      T* row = Base::uniform(Base::split(index, 1));
      Base::fill(row, second_width_);
      Base::add(static_cast<const T*>(call_.empty_value) + index * call_.value_width, T(1), row, call_.value_width);
    }
  }

  // The rows are queries: each finds all its keys here, in one block of columns if they are latents, in several with a
  // running maximum and sum if they are pixels.
  void attend_chunk(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(call_.query_tokens, item.image), keys(call_.key_tokens, item.image);
    const Matrix<Scalar> query = Base::matrix(call_.query, item, call_.key_width);
    const Matrix<Scalar> key = Base::matrix(call_.key, item, call_.key_width);
    const Matrix<Scalar> value = Base::matrix(call_.value, item, call_.value_width);
    const Matrix<Scalar> out = Base::matrix(call_.out, item, call_.value_width);
    const bool streamed = Base::streams(out, queries);
    const int64_t block = larger<int64_t>(most_columns(call_.key_tokens), 1);
    T* const* targets = scratch.row_second.rows;

    queries.for_each_label(Base::chunk(call_.query_tokens, item.index), [&](int64_t label, Range rows) {
      const Range columns = keys.with_label(label);
      const bool one_block = columns.size() <= block;
      const auto gather_columns = [&](int64_t begin, int64_t count) {
        key.gather(keys.at(begin), count, 0, scratch.column_first.memory, scratch.column_first.rows);
        value.gather(keys.at(begin), count, 0, scratch.column_second.memory, scratch.column_second.rows);
      };
      if (one_block) gather_columns(columns.begin, columns.size());
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        const int64_t following = queries.count() - p - count;
        const Positions tokens = queries.at(p);
        out.locate(tokens, count, scratch.row_second.memory, scratch.row_second.rows);
        if (columns.size() == 0) {
          write_unmatched(item, tokens, count, targets);
          out.scatter(tokens, count, scratch.row_second.memory);
          continue;
        }
        query.gather(tokens, count, following, scratch.row_first.memory, scratch.row_first.rows);
        RowSoftmax softmax;
        for (int64_t c = columns.begin; c < columns.end; c += block) {
          const int64_t column_count = smaller(block, columns.end - c);
          if (!one_block) gather_columns(c, column_count);
          Base::dots_and_fetch(query, queries, p, count, scratch.row_first.rows, scratch.column_first.rows,
                               column_count, first_width_, scratch.weights, scratch.next_rows);
          softmax.add(scratch.weights, column_count, static_cast<T>(call_.scale));
          Write write = Write::kAccumulate;
          if (one_block) {
            softmax.normalize(scratch.weights, column_count);
            write = streamed ? Write::kStream : Write::kReplace;
          } else if (c == columns.begin) {
            write = Write::kReplace;
          } else {
            for (int64_t r = 0; r < count; ++r) {
              if (softmax.correction[r] != 1) Base::scale(softmax.correction[r], targets[r], second_width_);
            }
          }
          weighted_sum(write, Weights<T>{scratch.weights, 1, kRowBlock}, scratch.column_second.rows, column_count,
                       targets, count, second_width_);
        }
        for (int64_t r = 0; r < count; ++r) {
          if (!one_block) Base::scale(1 / softmax.sum[r], targets[r], second_width_);
          lse(item)[tokens[r]] = softmax.max[r] + std::log(softmax.sum[r]);
        }
        out.scatter(tokens, count, scratch.row_second.memory);
      }
    });
    if (streamed) stream_fence();
  }

  void write_unmatched(const Item& item, Positions tokens, int64_t count, T* const* targets) const {
    for (int64_t r = 0; r < count; ++r) {
      Base::fill(targets[r], second_width_);
      if (call_.empty_value || call_.empty_uniform) Base::add(Base::uniform(item), T(1), targets[r], second_width_);
      lse(item)[tokens[r]] = -std::numeric_limits<T>::infinity();
    }
  }

  // The softmax of a block of rows over columns that come block by block.
  struct RowSoftmax {
    alignas(kVectorBytes) T max[kRowBlock];
    alignas(kVectorBytes) T sum[kRowBlock];
    alignas(kVectorBytes) T correction[kRowBlock];  // of what was accumulated before the last block

    RowSoftmax() {
      for (int64_t r = 0; r < kRowBlock; ++r) max[r] = -std::numeric_limits<T>::infinity(), sum[r] = 0;
    }

    // Turns logits into weights relative to the running maximum.
    void add(T* table, int64_t columns, T scale) {
      for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
        const Vector<T> old_max = load(max + r);
        Vector<T> new_max = old_max;
        for (int64_t c = 0; c < columns; ++c) {
          const Vector<T> logits = load(table + c * kRowBlock + r) * scale;
          store(table + c * kRowBlock + r, logits);
          new_max = maximum<T>(logits, new_max);
        }
        Vector<T> total = {};
        for (int64_t c = 0; c < columns; ++c) {
          const Vector<T> weights = exp<T>(load(table + c * kRowBlock + r) - new_max);
          store(table + c * kRowBlock + r, weights);
          total += weights;
        }
        const Vector<T> factor = exp<T>(old_max - new_max);
        store(correction + r, factor);
        store(max + r, new_max);
        store(sum + r, load(sum + r) * factor + total);
      }
    }

    void normalize(T* table, int64_t columns) const {
      for (int64_t r = 0; r < kRowBlock; r += kLanes<T>) {
        const Vector<T> factor = 1 / load(sum + r);
        for (int64_t c = 0; c < columns; ++c) {
          store(table + c * kRowBlock + r, load(table + c * kRowBlock + r) * factor);
        }
      }
    }
  };

  // The rows are pixel keys, the columns the latents that attend to them: a partial result for each of these latents.
  void pool_chunk(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(call_.query_tokens, item.image), keys(call_.key_tokens, item.image);
    const Matrix<Scalar> query = Base::matrix(call_.query, item, call_.key_width);
    const Matrix<Scalar> key = Base::matrix(call_.key, item, call_.key_width);
    const Matrix<Scalar> value = Base::matrix(call_.value, item, call_.value_width);
    keys.for_each_label(Base::chunk(call_.key_tokens, item.index), [&](int64_t label, Range rows) {
      const Range columns = queries.with_label(label);
      if (columns.size() == 0) return;
      query.gather(queries.at(columns.begin), columns.size(), 0, scratch.column_first.memory,
                   scratch.column_first.rows);
      T* max = Base::partial(Base::partials_.max, item, item.index, columns.begin, 1);
      T* sum = Base::partial(Base::partials_.sum, item, item.index, columns.begin, 1);
      T** targets = scratch.partial_rows;
      const T scale = static_cast<T>(call_.scale);
      for (int64_t c = 0; c < columns.size(); ++c) {
        max[c] = -std::numeric_limits<T>::infinity();
        sum[c] = 0;
        targets[c] = Base::partial(Base::partials_.second, item, item.index, columns.begin + c, second_width_);
        Base::fill(targets[c], second_width_);
      }
      for (int64_t p = rows.begin; p < rows.end; p += kRowBlock) {
        const int64_t count = smaller(kRowBlock, rows.end - p);
        const int64_t following = keys.count() - p - count;
        key.gather(keys.at(p), count, following, scratch.row_first.memory, scratch.row_first.rows);
        value.gather(keys.at(p), count, following, scratch.row_second.memory, scratch.row_second.rows);
        Base::dots_and_fetch(key, keys, p, count, scratch.row_first.rows, scratch.column_first.rows, columns.size(),
                             first_width_, scratch.weights, scratch.next_rows);
        add_to_softmax(scratch.weights, kRowBlock, columns.size(), count, kRowBlock, scale, max, sum,
                       [&](int64_t c, T factor) { Base::scale(factor, targets[c], second_width_); });
        weighted_sum(Write::kAccumulate, Weights<T>{scratch.weights, kRowBlock, 1}, scratch.row_second.rows, count,
                     targets, columns.size(), second_width_);
      }
    });
  }

  // The result of one label's latents, or of those without a label, from the partial results of the chunks, in their
  // order.
  void merge_label(const Item& item, Scratch<T>& scratch) const {
    const ImageTokens queries(call_.query_tokens, item.image), keys(call_.key_tokens, item.image);
    const Matrix<Scalar> out = Base::matrix(call_.out, item, call_.value_width);
    const Range latents = queries.in_group(item.index), pixels = keys.with_label(item.index);
    T** target = scratch.row_second.rows;
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      out.locate(queries.at(latent), 1, scratch.row_second.memory, target);
      if (pixels.size() == 0) {
        write_unmatched(item, queries.at(latent), 1, target);
      } else {
        const Range chunks = Base::chunks_of(pixels);
        T max = -std::numeric_limits<T>::infinity(), sum = 0;
        for (int64_t c = chunks.begin; c < chunks.end; ++c) {
          max = larger(max, *Base::partial(Base::partials_.max, item, c, latent, 1));
        }
        Base::fill(*target, second_width_);
        for (int64_t c = chunks.begin; c < chunks.end; ++c) {
          const T weight = std::exp(*Base::partial(Base::partials_.max, item, c, latent, 1) - max);
          sum += weight * *Base::partial(Base::partials_.sum, item, c, latent, 1);
          Base::add(Base::partial(Base::partials_.second, item, c, latent, second_width_), weight, *target,
                    second_width_);
        }
        Base::scale(1 / sum, *target, second_width_);
        lse(item)[latent] = max + std::log(sum);
      }
      out.scatter(queries.at(latent), 1, scratch.row_second.memory);
    }
  }
};

template <typename Scalar>
class TurnedForward : public TurnedCall<Scalar> {
  using Base = TurnedCall<Scalar>;
  using Base::call_;
  using Base::given_;
  using Base::turned_;

 public:
  explicit TurnedForward(const sca_semantic_cross_attention& given) : Base(given) {
    call_.out = turned_.result(given.out, Base::queries(), given.value_width);
  }

  int64_t workspace_size() { return turned_.used() + Forward<Scalar>(Base::call()).workspace_size(); }
  void run() {
    Forward<Scalar>(Base::call()).run();
    turned_.write(call_.out, given_.out, Base::queries(), given_.value_width);
  }
};

}  // namespace

int64_t semantic_cross_attention_workspace(const sca_semantic_cross_attention& call) {
  int64_t size = 0;
  with_scalar_type(call.scalar_type,
                   [&](auto scalar) { size = TurnedForward<decltype(scalar)>(without_memory(call)).workspace_size(); });
  return size;
}

void semantic_cross_attention_forward(const sca_semantic_cross_attention& call) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { TurnedForward<decltype(scalar)>(call).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
